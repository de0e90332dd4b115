"""`loom lock run`: one command at a time, whatever is stopped or killed, and the exit statuses of `loom lock`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from harness import MARGIN, Cluster, Process, wait_until
from harness.loom_client import client_of
from harness.processes import stopped

from loom.client.clock import now

TTL = 3
GRACE = TTL / 3


class Commands:
    """Runs `loom lock run` with a shell script that appends its times to a file while it runs."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.log, self._folder, self._count = folder / "runs", folder, 0
        self.log.touch()
        self.server = ",".join(f"http://127.0.0.1:{port}" for port in cluster.ports)

    def start(self, *words: str, ttl: int = TTL, wait: float = 60) -> Process:
        self._count += 1
        options = ["--server", self.server, "--ttl", str(ttl), "--wait", str(wait), "deploy", "--", *words]
        log = self._folder / f"{self._count}.log"
        return Process([sys.executable, "-m", "loom", "lock", "run", *options], log)

    def ticking(self, name: str, before: str = "") -> tuple[str, ...]:
        """A command that says ten times a second that it runs. It ignores SIGTERM after `trap '' TERM;`."""
        loop = (
            "import os, sys, time\nwhile True:\n now = time.clock_gettime(time.CLOCK_BOOTTIME)\n"
            " os.write(1, f'{sys.argv[1]} {now}\\n'.encode())\n time.sleep(0.05)"
        )
        return "sh", "-c", f"{before} {sys.executable} -c '{_quoted(loop)}' {name} >>{self.log}; exit 0"

    def ticks(self, name: str) -> list[float]:
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [float(at) for who, at in lines if who == name]


def _quoted(text: str) -> str:
    return text.replace("'", "'\"'\"'")


@pytest.fixture
def commands(cluster: Cluster, tmp_path: Path) -> Commands:
    return Commands(cluster, tmp_path)


@contextmanager
def _outage(cluster: Cluster) -> Iterator[None]:
    with cluster.frozen(0), cluster.frozen(1), cluster.frozen(2):
        yield


@pytest.mark.parametrize("fault", ["stopped", "killed", "instance", "outage"])
def test_no_two_commands_run_at_once_beyond_a_third_of_the_ttl(
    cluster: Cluster, commands: Commands, fault: str
) -> None:
    """Also when the first ignores SIGTERM: it is killed."""
    first = commands.start(*commands.ticking("one", "trap '' TERM;"))
    wait_until(lambda: commands.ticks("one"))
    second = commands.start(*commands.ticking("two"))
    with stopped([first.pid]) if fault == "stopped" else _outage(cluster) if fault == "outage" else nullcontext():
        if fault == "killed":
            first.send(signal.SIGKILL)
        elif fault == "instance":
            for number in range(3):
                cluster.kill(number)
        if fault == "outage":
            wait_until(lambda: now() - commands.ticks("one")[-1] > 1, TTL + GRACE + MARGIN)
        elif fault != "instance":
            wait_until(lambda: commands.ticks("two"), TTL + GRACE + 2 + MARGIN)
            time.sleep(GRACE + 1)  # the first is still stopped: the guard must have ended its command
    if fault == "instance":  # the lock is kept
        time.sleep(TTL + 1)
        assert now() - commands.ticks("one")[-1] < 1
        assert not commands.ticks("two")
        first.stop(signal.SIGKILL)
    wait_until(lambda: commands.ticks("two"), TTL + GRACE + 10 + MARGIN)
    time.sleep(GRACE + 0.3)
    overlap = commands.ticks("one")[-1] - commands.ticks("two")[0]
    assert overlap <= GRACE + 0.2, overlap
    assert now() - commands.ticks("one")[-1] > 0.2
    if fault in ("stopped", "outage"):
        assert first.wait(5) == 70
    second.stop(signal.SIGTERM)


def test_the_exit_status_is_the_commands_and_the_token_is_in_its_environment(
    cluster: Cluster, commands: Commands, tmp_path: Path
) -> None:
    client = client_of(cluster)
    assert commands.start("sh", "-c", f"echo $LOOM_FENCING_TOKEN $LOOM_LOCK_NAME >{tmp_path}/env; exit 3").wait(20) == 3
    (grant,) = client.list_grants(lock_name="deploy")
    assert (tmp_path / "env").read_text().split() == [str(grant.fencing_token), "deploy"]
    assert (grant.ended_how, grant.metadata) == ("released", {"command": "sh"})
    assert commands.start("sh", "-c", "kill -KILL $$").wait(20) == 128 + 9
    assert commands.start("/no/such/command").wait(20) == 127
    assert commands.start("/").wait(20) == 126
    with client.lock("deploy"):
        began = time.monotonic()
        assert commands.start("true", wait=1).wait(20) == 75
        assert time.monotonic() - began < 1 + 1 + MARGIN


def test_a_signal_reaches_the_whole_group_of_the_command(commands: Commands, tmp_path: Path) -> None:
    script = f"trap 'echo parent >>{tmp_path}/got; wait; exit 5' TERM; (trap 'echo child >>{tmp_path}/got; exit' TERM; "
    run = commands.start("sh", "-c", f"{script} touch {tmp_path}/up; while :; do sleep 0.1; done) & wait")
    wait_until((tmp_path / "up").exists)
    run.send(signal.SIGTERM)
    assert run.wait(10) == 5
    assert sorted((tmp_path / "got").read_text().split()) == ["child", "parent"]


def test_a_command_whose_lock_is_ended_by_force_is_ended(cluster: Cluster, commands: Commands) -> None:
    client = client_of(cluster)
    run = commands.start(*commands.ticking("one"))
    wait_until(lambda: commands.ticks("one"))
    loom = [sys.executable, "-m", "loom", "lock"]
    server = ["--server", commands.server]

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*loom, *words, *server], capture_output=True, text=True, stdin=subprocess.DEVNULL)

    (held,) = json.loads(call("ls", "--json").stdout)
    assert held["lock_name"] == "deploy"
    shown = call("show", "deploy")
    assert held["owner"] in shown.stdout
    refused = call("force-release", "deploy", "--reason", "test")  # nobody is there to be asked
    assert refused.returncode == 1
    assert client.get_lock("deploy") is not None
    assert call("force-release", "deploy", "--reason", "test", "--yes").returncode == 0
    assert run.wait(TTL + GRACE + MARGIN) == 70
    free = call("show", "deploy", "--json")
    assert (free.returncode, free.stdout) == (3, "")
    lost = call("release", "deploy", str(held["fencing_token"]))
    assert (lost.returncode, lost.stdout) == (4, "")
    assert "Error: " in lost.stderr
    unreachable = subprocess.run([*loom, "ls", "--server", "http://127.0.0.1:9"], capture_output=True, text=True)
    assert unreachable.returncode == 69
    assert "LOOM_SERVER" in unreachable.stderr
