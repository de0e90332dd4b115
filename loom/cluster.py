"""Several instances on one machine, with nginx in front of them; `make run` starts it."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import click

from loom import db, embedded
from loom.config import Config, environment, resource
from loom.ports import check_free

START_SECONDS = 30  # from the start of an instance to its first successful /health
STOP_SECONDS = {"nginx": 3, "instance": 25}  # 25: above gunicorn's graceful_timeout
RESTART_SECONDS = 1  # the least time between two starts of the same process
ADVICE = "Choose others: make run PORT=18080 NGINX_PORT=18000, or loom cluster --port 18080 --nginx-port 18000."
SBIN = "/usr/sbin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin"


class ClusterError(Exception):
    """The cluster does not start."""


@dataclass
class Member:
    """A process that is restarted when it ends; `kind` is "instance" or "nginx"."""

    kind: str
    port: int
    command: list[str]
    process: subprocess.Popen[bytes] = field(init=False)
    started: float = field(init=False)

    def start(self) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command,
            env=environment(PORT=str(self.port)),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches only us; we stop the processes in order
            preexec_fn=embedded.parent_bound(signal.SIGTERM),
        )

    def stop(self, number: signal.Signals) -> None:
        """Signal the process, or the workers that it left behind if it has ended."""
        with suppress(ProcessLookupError):
            if self.process.poll() is None:
                self.process.send_signal(number)
            else:
                os.killpg(self.process.pid, number)

    def wait(self, deadline: float) -> None:
        """Wait for the end of the process, and kill it at the deadline."""
        try:
            self.process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __str__(self) -> str:
        return f"{self.kind} on port {self.port}"


def run(config: Config, instances: int, port: int, nginx_port: int, say: Callable[[str], None]) -> None:
    """Run the cluster until SIGINT, SIGTERM or SIGHUP; `say` prints a line. Call it from the main thread.

    Raises PortError when a port is taken, ClusterError when a process does not start, and the errors of embedded.use
    and db.migrate.
    """
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stopping.set())
    host = config.server.host
    ports = range(port, port + instances)
    nginx = shutil.which("nginx") or shutil.which("nginx", path=SBIN)
    for needed in [*ports, nginx_port] if nginx else ports:
        check_free(host, needed, ADVICE)
    with _database(config) as dsn:
        db.migrate(dsn)
        members = [Member("instance", p, [sys.executable, "-m", "loom", "serve"]) for p in ports]
        if nginx:
            members.append(Member("nginx", nginx_port, [nginx, *_nginx_arguments(nginx, host, ports, nginx_port)]))
        try:
            _start(members, host, stopping)
            if not stopping.is_set():
                say(_welcome(config, members))
            _restart_ended(members, stopping, say)
        finally:
            _stop(members)


@contextmanager
def _database(config: Config) -> Iterator[str]:
    if config.database.dsn:
        yield config.database.dsn
        return
    folder = Path(config.database.folder)
    dsn = embedded.use(folder)
    try:
        yield dsn
    finally:
        embedded.leave(folder)


def _start(members: list[Member], host: str, stopping: threading.Event) -> None:
    """Start all instances, then nginx when all of them are healthy."""
    for kind in ("instance", "nginx"):
        starting = [member for member in members if member.kind == kind]
        for member in starting:
            member.start()
        for member in starting:
            while not stopping.is_set() and not _healthy(host, member.port):
                if member.process.poll() is not None:
                    raise ClusterError(f"The {member} ended with status {member.process.returncode}; see above.")
                if time.monotonic() > member.started + START_SECONDS:
                    raise ClusterError(f"The {member} is not healthy after {START_SECONDS} s; see above.")
                stopping.wait(0.05)


def _restart_ended(members: list[Member], stopping: threading.Event, say: Callable[[str], None]) -> None:
    while not stopping.wait(0.2):
        for member in members:
            status = member.process.poll()
            if status is not None and time.monotonic() > member.started + RESTART_SECONDS:
                how = signal.Signals(-status).name if status < 0 else f"status {status}"
                say(f"The {member} ended (process {member.process.pid}, {how}) and is being restarted.")
                member.stop(signal.SIGTERM)
                member.start()


def _stop(members: list[Member]) -> None:
    """Stop nginx, which accepts requests, then the instances, which answer them."""
    for kind, number in (("nginx", signal.SIGQUIT), ("instance", signal.SIGTERM)):
        running = [member for member in members if member.kind == kind and hasattr(member, "process")]
        for member in running:
            member.stop(number)
        deadline = time.monotonic() + STOP_SECONDS[kind]
        for member in running:
            member.wait(deadline)


def _healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(reachable(host), port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _netloc(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _nginx_arguments(nginx: str, host: str, ports: Iterable[int], port: int) -> list[str]:
    """Write nginx/loom.conf with these ports, and a configuration that includes it; return nginx's arguments."""
    folder = Path("var/nginx", str(port)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ours = resource("nginx/loom.conf").read_text()
    ours = re.sub(r"^ *server 127\.0\.0\.1:808[12] .*\n", "", ours, flags=re.MULTILINE)
    for line in re.findall(r"^ *server 127\.0\.0\.1:8080 .*\n", ours, re.MULTILINE):
        own = "".join(line.replace("127.0.0.1:8080", _netloc(reachable(host), p)) for p in ports)
        ours = ours.replace(line, own)
    ours = re.sub(r"\blisten [^;]*;", f"listen {_netloc(host, port)};", ours)
    (folder / "loom.conf").write_text(ours)
    temporary = " ".join(f"{kind}_temp_path {kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    # Otherwise nginx, started by root, would run its workers as a user who may not read these folders.
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"daemon off; {user} pid nginx.pid; error_log stderr;\nevents {{ worker_connections 1024; }}\n"
        f"http {{ access_log off; {temporary}\ninclude loom.conf;\n}}\n"
    )
    # -e (since 1.19.5) sends messages from before nginx reads its configuration to stderr instead of a log file.
    has_e = "-e filename" in subprocess.run([nginx, "-h"], capture_output=True, text=True, check=False).stderr
    return ["-p", f"{folder}/", "-c", "nginx.conf", *(["-e", "stderr"] if has_e else [])]


def _welcome(config: Config, members: list[Member]) -> str:
    """On a terminal, what to do next is bold."""
    where = "your database"
    if not config.database.dsn:
        folder = Path(config.database.folder)
        where = f"PostgreSQL in {folder}, the programs in {embedded.binaries(folder / 'data')}"
    urls = [f"http://{_netloc(reachable(config.server.host), member.port)}" for member in members]
    front = members[-1].kind == "nginx"
    lines = [
        "",
        f"Loom runs on {where}:",
        *(f"  {click.style(url, bold=True)}  {member.kind}" for url, member in zip(urls, members, strict=True)),
    ]
    if not front:
        lines.append("nginx is not installed. For one address in front of all instances: apt-get install nginx.")
    curl = click.style(f"curl {urls[-1 if front else 0]}/health", fg="green", bold=True)
    lines += ["Ctrl-C stops everything.", f"Try: {curl}", ""]
    return "\n".join(lines)
