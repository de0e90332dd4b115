"""Instances of Loom as an operator runs them: one gunicorn a port, and nginx in front when asked."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loom
from harness.client import Client
from harness.processes import Process, free_port, program, stopped, wait_until
from loom.config import resource

ROOT = Path(loom.__file__).parents[1]


class Cluster:
    """`count` instances on one database, numbered from 0; each gunicorn in a session of its own."""

    def __init__(
        self,
        dsn: str,
        count: int = 3,
        *,
        nginx: bool = False,
        nginx_changes: dict[str, str] | None = None,
        config: str = "",
        env: dict[str, str] | None = None,
        app: str = "app:app",
    ) -> None:
        """Start and wait until they serve.

        `nginx_changes`: texts of nginx's configuration, and what they become.
        `config`: the text of config.yaml; `env`: added to the environment; `app`: what gunicorn loads.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="loom-test-cluster-"))
        self.ports = [free_port() for _ in range(count)]
        (self.folder / "config.yaml").write_text(config)
        self._env = {"DATABASE_TYPE": "postgres", "DATABASE_DSN": dsn, "LOOM_CONFIG": str(self.folder / "config.yaml")}
        self._env |= {"TMPDIR": str(self.folder), **(env or {})}  # a killed gunicorn leaves files there
        self._app = app
        self._nginx: Nginx | None = None
        self._clients: list[Client] = []
        self.masters: list[Process] = []
        try:
            self.masters += [self._start(i) for i in range(count)]
            for i in range(count):
                self.wait_serving(i)
            if nginx:
                self._nginx = Nginx(self.folder, self.ports, nginx_changes)
        except BaseException:
            self.close()
            raise

    def _start(self, i: int) -> Process:
        command = [sys.executable, "-m", "gunicorn", "-c", str(resource("gunicorn.conf.py")), self._app]
        return Process(command, self.folder / f"{i}.log", env={**self._env, "PORT": str(self.ports[i])}, cwd=ROOT)

    def client(self, i: int = 0, timeout: float = 40.0) -> Client:
        """A new connection to instance i."""
        self._clients.append(Client(self.ports[i], timeout))
        return self._clients[-1]

    @property
    def nginx_url(self) -> str:
        assert self._nginx is not None, "started without nginx"
        return self._nginx.url

    def nginx_client(self, timeout: float = 40.0) -> Client:
        """A new connection to nginx."""
        self._clients.append(Client(self.nginx_url, timeout))
        return self._clients[-1]

    def master(self, i: int) -> int:
        """The process number of instance i's gunicorn master."""
        return self.masters[i].pid

    def pid(self, i: int) -> int:
        """The process number of instance i's worker: the last one in its master's log."""
        booted = re.findall(r"Booting worker with pid: (\d+)\D", self.masters[i].log.read_text(errors="replace"))
        return int(booted[-1])

    def kill(self, i: int) -> int:
        """Kill the worker by SIGKILL and return its process number; the master starts another."""

        def killed() -> int:
            pid = self.pid(i)
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the next one is about to start
                os.kill(pid, signal.SIGKILL)
                return pid
            return 0

        return wait_until(killed)

    @contextlib.contextmanager
    def frozen(self, i: int) -> Iterator[None]:
        """Keep the worker stopped by SIGSTOP."""
        with stopped([self.pid(i)]):
            yield

    def restart(self, i: int) -> None:
        """As `systemctl restart`: SIGTERM, wait for the end, start again, wait until it serves."""
        self.masters[i].stop(signal.SIGTERM, 40)
        self.start(i)

    def start(self, i: int) -> None:
        """Start gunicorn i again, once it has ended, and wait until it serves."""
        self.masters[i] = self._start(i)
        self.wait_serving(i)

    def wait_serving(self, i: int, timeout: float = 60.0) -> None:
        """Wait until instance i answers anything, even 503."""

        def serves() -> bool:
            assert self.masters[i].runs, f"gunicorn {i} ended:\n{self.masters[i].last_lines()}"
            return self.health(i) is not None

        wait_until(serves, timeout, 0.02)

    def health(self, i: int, timeout: float = 10.0) -> dict[str, Any] | None:
        """What instance i answers to GET /health, or None when it cannot be reached."""
        client = Client(self.ports[i], timeout)
        with contextlib.suppress(OSError), contextlib.closing(client):
            return client.get("/health").json
        return None

    def wait_healthy(self, count: int | None = None, timeout: float = 60.0) -> None:
        """Wait until each instance is healthy and counts `count` (all, by default) active ones."""
        wanted = len(self.ports) if count is None else count

        def all_healthy() -> bool:
            answers = [self.health(i) for i in range(len(self.ports))]
            return all(a is not None and a["healthy"] and a["active_instances"] == wanted for a in answers)

        wait_until(all_healthy, timeout, 0.05)

    def close(self) -> None:
        """Kill everything and print the end of each log, which pytest shows when the test has failed.

        An orderly shutdown is for the tests that are about it: it takes a second, and half the CPU time of a start.
        """
        for client in self._clients:
            client.close()
        if self._nginx is not None:
            self._nginx.close()
        for i, master in enumerate(self.masters):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(master.pid, signal.SIGKILL)  # also workers that a dead master left behind
            master.wait()
            print(f"--- gunicorn {i} on port {self.ports[i]}\n{master.last_lines()}")
        shutil.rmtree(self.folder, ignore_errors=True)


class Nginx:
    """nginx with the project's own configuration, its ports replaced."""

    def __init__(self, folder: Path, ports: list[int], changes: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        text = resource("nginx/loom.conf").read_text()
        text = re.sub(r"^ *server 127\.0\.0\.1:808[12] .*\n", "", text, flags=re.MULTILINE)
        text = re.sub(
            r"^( *server 127\.0\.0\.1:)8080( .*\n)",
            lambda line: "".join(f"{line[1]}{port}{line[2]}" for port in ports),
            text,
            flags=re.MULTILINE,
        )
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        text, count = re.subn(r"listen [^;]*;", f"listen 127.0.0.1:{self.port};", text)
        assert count >= 1
        assert all(f"server 127.0.0.1:{port} " in text for port in ports)
        config = folder / "nginx.conf"
        paths = "".join(f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = "user root;" if os.geteuid() == 0 else ""
        config.write_text(
            f"daemon off; {user} pid {folder}/nginx.pid; error_log {folder}/nginx.log warn;\n"
            f"events {{ worker_connections 1024; }}\nhttp {{ access_log off; {paths}\n{text}\n}}\n"
        )
        self.process = Process([program("nginx", "nginx"), "-c", config, "-p", folder], folder / "nginx.log")
        wait_until(self._answers, 10)

    def _answers(self) -> bool:
        assert self.process.runs, self.process.last_lines()
        with contextlib.suppress(OSError), contextlib.closing(Client(self.port, 5)) as client:
            return client.get("/health/live").status == 200
        return False

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        print(f"--- nginx\n{self.process.last_lines()}")
