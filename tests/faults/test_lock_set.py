"""Promise 1: a write that is fenced in its own transaction is never lost; without fencing this test finds lost ones."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from harness import Cluster, Process
from harness.history import assert_one_holder, grants
from harness.locks import Sql

WRITERS = 3
ASLEEP = 1.5  # seconds: half a second more than the writers' TTL


def stopped_since(process: Process, stops: dict[int, float]) -> float:
    """When a process was first seen to be stopped; infinity while it runs."""
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    if state != "T":
        stops.pop(process.pid, None)
    return stops.setdefault(process.pid, time.monotonic()) if state == "T" else float("inf")


def run(writers: list[Process]) -> None:
    """Wait until all have ended; wake those that stopped themselves, once they have slept for long enough."""
    stops: dict[int, float] = {}
    while any(writer.runs for writer in writers):
        for writer in writers:
            if writer.runs and stopped_since(writer, stops) < time.monotonic() - ASLEEP:
                os.kill(writer.pid, signal.SIGCONT)
                stops.pop(writer.pid)
        time.sleep(0.02)
    for writer in writers:
        assert writer.wait() == 0, writer.last_lines()


def said(writers: list[Process], word: str) -> set[int]:
    lines = [line.split() for writer in writers for line in writer.log.read_text().splitlines()]
    return {int(line[1]) for line in lines if line[0] == word}


def test_no_acknowledged_write_is_lost_with_fencing_and_some_are_without(
    cluster: Cluster, dsn: str, sql: Sql, tmp_path: Path, long: bool
) -> None:
    sql("CREATE TABLE lock_set (name text PRIMARY KEY, numbers integer[] NOT NULL)")
    sql("INSERT INTO lock_set VALUES ('fenced', '{}'), ('unfenced', '{}')")

    def start(name: str, first: int) -> Process:
        script = str(Path(__file__).with_name("lock_set_writer.py"))
        port, fenced = str(cluster.ports[first % 3]), str(int(name == "fenced"))
        command = [sys.executable, script, dsn, port, name, fenced, str(first), str(WRITERS), "60" if long else "6"]
        return Process(command, tmp_path / f"{name}-{first}", env={"PYTHONPATH": os.pathsep.join(sys.path)})

    writers = {name: [start(name, first) for first in range(WRITERS)] for name in ("fenced", "unfenced")}
    run(writers["fenced"] + writers["unfenced"])

    kept = {name: set(numbers) for name, numbers in sql("SELECT name, numbers FROM lock_set")}
    acknowledged = {name: said(group, "acknowledged") for name, group in writers.items()}
    refused = said(writers["fenced"], "refused")
    lost = {name: len(acknowledged[name] - kept[name]) for name in writers}
    print(f"lost {lost} of { ({name: len(some) for name, some in acknowledged.items()}) } acknowledged, {refused=}")
    assert acknowledged["fenced"] == kept["fenced"]
    assert refused, "no writer slept for longer than its TTL, so nothing was tested"
    assert lost["unfenced"], "without fencing nothing was lost: this test detects nothing"
    for name in writers:
        assert_one_holder(grants(sql, name))
