"""`loom cluster`, which `make run` calls: one command starts everything, and no process is left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Client, free_port, program, wait_until
from harness.users import NOBODY, as_nobody

LOOM = "from loom.cli import main; main()"
UP = "Ctrl-C stops everything."


class Run:
    """`loom cluster` in a folder of its own."""

    def __init__(self, folder: Path, code: str = LOOM, **options: Any) -> None:
        self.port, self.nginx_port = free_port(3), free_port()
        self.log = folder / "log"
        self.mark = f"LOOM_TEST_RUN={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        environ = {n: v for n, v in options.pop("env", os.environ).items() if not n.startswith("DATABASE_")}
        ports = ["--port", str(self.port), "--nginx-port", str(self.nginx_port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [options.get("executable", sys.executable), "-c", code, "cluster", *ports],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environ, "LOOM_CONFIG": "", name: value},
                **options,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_up(self) -> None:
        wait_until(lambda: UP in self.said() or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.said()

    def active(self, port: int) -> int | None:
        with contextlib.suppress(OSError), contextlib.closing(Client(port, 10)) as client:
            return client.get("/health").json["active_instances"]
        return None

    def processes(self) -> list[str]:
        """Return the command lines of its processes that still run, whatever their parent is by now."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def listens(self) -> list[int]:
        ports = [*range(self.port, self.port + 3), self.nginx_port]
        return [port for port in ports if not _refused(port)]


def _refused(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def runs(folder: Path) -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            run.process.terminate()
        run.process.wait(40)
        print(run.said())


def test_one_command_starts_everything_and_ctrl_c_stops_it(folder: Path, runs: list[Run]) -> None:
    program("nginx", "nginx")
    runs.append(run := Run(folder))
    run.wait_up()
    assert run.active(run.nginx_port) == 3
    assert f"curl http://127.0.0.1:{run.nginx_port}/health" in run.said()
    assert run.active(run.port + 2) == 3
    assert (folder / "var/postgres/data").is_dir()
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(30) == 0
    assert run.processes() == []
    assert run.listens() == []


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_lines_are_short_and_what_to_do_comes_last(folder: Path, no_color: str) -> None:
    """With colours, which NO_COLOR switches off."""
    ports = [free_port(2), free_port()]
    command = [sys.executable, "-c", LOOM, "cluster", "--instances", "2", "--port", str(ports[0])]
    environ = {n: v for n, v in os.environ.items() if not n.startswith("DATABASE_")}
    here, there = pty.openpty()
    process = subprocess.Popen(
        [*command, "--nginx-port", str(ports[1])],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=there,
        stderr=there,
        env={**environ, "LOOM_CONFIG": "", "NO_COLOR": no_color, "TERM": "xterm"},
    )
    os.close(there)
    os.set_blocking(here, False)
    shown = ""

    def said(text: str) -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(here, 100_000).decode()
        return text in shown

    try:
        wait_until(lambda: said("/health"), 60)
        assert shown.count("instance-registered") == 2
        last = shown.splitlines()[-2]
        with contextlib.closing(Client(ports[0], 10)) as client:
            client.get("/api/v1/locks/%1b%5b31m")
        wait_until(lambda: said(" ms"))
    finally:
        process.terminate()
        process.wait(40)
        os.close(here)
    assert ("\x1b" in shown) == (not no_color)
    assert re.sub(r"\x1b\[\d+m", "", last).startswith("Try: curl http://127.0.0.1:")
    lines = re.sub(r"\x1b\[\d+m", "", shown).splitlines()
    assert any(re.fullmatch(rf"{ports[0]} \d\d:\d\d:\d\d GET \S*\\u001b\S* 400 [\d.]+ ms", line) for line in lines), (
        lines
    )
    assert not any('"event"' in line for line in lines)


def test_a_killed_loom_cluster_leaves_no_process_behind(folder: Path, runs: list[Run]) -> None:
    runs.append(run := Run(folder))
    run.wait_up()
    run.process.kill()
    wait_until(lambda: run.processes() == [] and run.listens() == [], 30)


def test_a_killed_gunicorn_and_a_killed_nginx_are_started_again(folder: Path, runs: list[Run]) -> None:
    program("nginx", "nginx")
    runs.append(run := Run(folder))
    run.wait_up()
    master = re.search(rf"Listening at: http://127.0.0.1:{run.port} \((\d+)\)", run.said())
    assert master
    os.kill(int(master[1]), signal.SIGKILL)
    os.kill(int((folder / f"var/nginx/{run.nginx_port}/nginx.pid").read_text()), signal.SIGKILL)
    wait_until(lambda: run.said().count("SIGKILL) and is being restarted") == 2)
    wait_until(lambda: run.active(run.port) == 3 and run.active(run.nginx_port) == 3, 30)
    run.process.terminate()
    assert run.process.wait(40) == 0
    assert run.processes() == []
    assert run.listens() == []


def test_a_killed_database_is_started_again(folder: Path, runs: list[Run]) -> None:
    runs.append(run := Run(folder))
    run.wait_up()
    pid_file = folder / "var/postgres/data/postmaster.pid"
    server = pid_file.read_text().split()[0]
    os.kill(int(server), signal.SIGKILL)

    def another_server() -> bool:
        with contextlib.suppress(FileNotFoundError):  # the file comes and goes with the server
            return pid_file.read_text().split()[:1] not in ([], [server])
        return False

    wait_until(another_server, 30)
    wait_until(lambda: [run.active(run.port + i) for i in range(3)] == [3, 3, 3], 30)


def test_a_taken_port_is_reported_before_anything_starts(folder: Path, runs: list[Run]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code = f"import sys; sys.argv[sys.argv.index('--port') + 1] = '{port}'; {LOOM}"
        runs.append(run := Run(folder, code))
        assert run.process.wait(20) == 1
    assert f"Port {port} is taken by process {os.getpid()} (" in run.said()
    assert "make run PORT=" in run.said()
    assert not (folder / "var").exists()


def test_without_nginx_it_says_what_to_install(folder: Path, runs: list[Run]) -> None:
    code = f"from loom import cluster; cluster.SBIN = '/nowhere'; {LOOM}"
    runs.append(run := Run(folder, code, env={**os.environ, "PATH": "/usr/bin:/bin"}))
    run.wait_up()
    assert run.active(run.port) == 3
    assert "apt-get install nginx" in run.said()
    assert _refused(run.nginx_port)


def test_an_ordinary_user_can_run_everything(folder: Path, runs: list[Run]) -> None:
    if os.geteuid() != 0:
        pytest.skip("the tests run as an ordinary user")
    program("nginx", "nginx")
    ordinary = as_nobody()
    os.chown(folder, NOBODY, NOBODY)
    runs.append(run := Run(folder, **ordinary))
    run.wait_up()
    assert run.active(run.nginx_port) == 3
    assert (folder / "var/postgres").stat().st_uid == NOBODY
    run.process.terminate()
    assert run.process.wait(30) == 0
    assert run.processes() == []
