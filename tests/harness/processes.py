"""Child processes that end with the tests, reserved ports, and waiting for conditions."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from loom.embedded import parent_bound

T = TypeVar("T")

PORTS = range(10_000, 32_000)  # below the ports of outgoing connections
MARGIN = 2.0  # seconds that a busy machine may add to a promised bound
_reserved: list[socket.socket] = []


def wait_until(condition: Callable[[], T], timeout: float = 10.0, period: float = 0.01) -> T:
    """Poll until `condition` returns a true value, and return it. Fails the test after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"did not come true within {timeout} s (last: {value!r})")
        time.sleep(period)


def free_port(count: int = 1) -> int:
    """Return the first of `count` TCP ports of the loopback that no other test run gets while this process lives.

    They are reserved by their UDP ports, which nothing here uses.
    """
    while True:
        first = random.SystemRandom().choice(PORTS)
        with contextlib.suppress(OSError):
            for port in range(first, first + count):
                _reserve(port)
            return first


def _reserve(port: int) -> None:
    """Raises OSError when the port is taken, also by this process."""
    with socket.socket() as tcp:
        udp = socket.socket(type=socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", port))
        tcp.bind(("127.0.0.1", port))
        _reserved.append(udp)


def _find(name: str) -> str | None:
    return shutil.which(
        name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    )


def program(name: str, package: str) -> str:
    """Return the path of a program; if it is missing, skip the test, or fail where CI=true."""
    found = _find(name)
    if found is None:
        reason = f"{name} is not installed (Debian: apt-get install {package})"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def version(name: str, option: str = "--version") -> str:
    """Return the version number that a program prints, or "missing"."""
    path = _find(name)
    if path is None:
        return "missing"
    run = subprocess.run([path, option], capture_output=True, text=True, check=False)
    number = re.search(r"\d+(\.\d+)+", run.stdout + run.stderr)
    return number[0] if number else "unknown"


def children(pid: int) -> list[int]:
    """Return the process numbers of a process's living children."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(entry.parent.name))
    return sorted(found)


@contextlib.contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Keep processes stopped by SIGSTOP, and let them go on afterwards."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Process:
    """A child in a session of its own, so that Ctrl-C reaches only the tests; it gets `last` when they die."""

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        last: signal.Signals = signal.SIGTERM,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """`env` is added to the environment; the output of the child is appended to `log`."""
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
                preexec_fn=parent_bound(last),
            )
        self.pid = self._popen.pid

    @property
    def runs(self) -> bool:
        return self._popen.poll() is None

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout: float = 10.0) -> int:
        """Wait for the end, and return the exit status. Raises subprocess.TimeoutExpired."""
        return self._popen.wait(timeout)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 10.0) -> None:
        """End it by this signal, or by SIGKILL if that takes longer than `timeout` seconds."""
        self.send(signal.SIGCONT)
        self.send(number)
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self.wait()

    def last_lines(self, count: int = 60) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])


def memory(pid: int) -> int:
    """The most memory that a process has had, in bytes (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
