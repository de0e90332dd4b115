"""The units that an operator installs."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Process, free_port, program
from harness.cluster import ROOT

UNITS = ROOT / "systemd"
INSTALLED = "/opt/loom/bin/loom"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A folder with the units as installed, whose program exists."""
    for unit in UNITS.iterdir():
        text = unit.read_text()
        assert unit.name == "loom.target" or INSTALLED in text
        for name in {unit.name, unit.name.replace("@.", "@8080.")}:
            (tmp_path / name).write_text(text.replace(INSTALLED, "/bin/true"))
    return tmp_path


def analyze(*arguments: str | Path) -> str:
    """Return what systemd-analyze prints. Fails the test when it reports a fault."""
    command = [program("systemd-analyze", "systemd"), *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert run.returncode == 0, run.stdout
    return run.stdout


def test_systemd_finds_no_fault_in_the_units(units: Path) -> None:
    assert analyze("verify", "--man=no", units / "loom@8080.service", units / "loom.target") == ""


def test_the_service_is_hardened(units: Path) -> None:
    analyze(
        "security", "--offline=true", "--threshold=15", units / "loom@8080.service"
    )  # 1.5 of 10, where 10 is unprotected


def test_systemd_waits_longer_for_a_stop_than_gunicorn_takes() -> None:
    unit, gunicorn = (UNITS / "loom@.service").read_text(), (ROOT / "gunicorn.conf.py").read_text()
    systemds, gunicorns = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.M), re.search(r"timeout = (\d+) \+", gunicorn)
    assert systemds
    assert gunicorns
    assert int(systemds[1]) > int(gunicorns[1])


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket on which a service notifies systemd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.settimeout(20)
        yield sock


def test_the_service_notifies_systemd_when_it_is_ready(notified: socket.socket, dsn: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    env = {"NOTIFY_SOCKET": notified.getsockname(), "DATABASE_DSN": dsn, "PORT": str(free_port())}
    command = [sys.executable, "-c", "from loom.cli import main; main()", "serve"]
    process = Process(
        command, tmp_path / "log", env={**env, "LOOM_CONFIG": str(tmp_path / "config.yaml")}, cwd=tmp_path
    )
    try:
        said, (about,), *_ = notified.recvmsg(1000, socket.CMSG_SPACE(12))
        assert b"READY=1" in said.splitlines()
        assert struct.unpack("3i", about[2]) == (process.pid, os.getuid(), os.getgid())  # NotifyAccess=main
    finally:
        process.stop()
