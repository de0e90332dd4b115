"""A worker that cannot serve does not look alive: it leaves the registry, is replaced, and the third ends gunicorn."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import Cluster, wait_until
from harness.locks import Sql

# What gunicorn loads in the tests: the application, broken for as many workers as the file `broken` says.
MODULE = """
import os
from pathlib import Path
from app import app

broken = Path(__file__).with_name("broken")
left = int(broken.read_text())
if left:
    new = broken.with_name(str(os.getpid()))
    new.write_text(str(left - 1))
    new.replace(broken)
{fault}
"""
# By the way in which the application is broken: its code, and the reason that is logged.
FAULTS = {
    # As when a thread of the master had begun an import, which is left half done in the worker.
    "an import that fails for ever": (
        "import sys\nsys.modules['half_done'] = None\ndef app(environ, start_response): import half_done",
        "ModuleNotFoundError('import of half_done halted; None in sys.modules')",
    ),
    "an exception": ("def app(environ, start_response): raise RuntimeError('broken')", "RuntimeError('broken')"),
    "an exception while the body is sent": (
        "def app(environ, start_response):\n"
        "    start_response('200 OK', [])\n"
        "    yield b'{'\n"
        "    raise RuntimeError('broken')",
        "RuntimeError('broken')",
    ),
    "a status": (
        "def app(environ, start_response):\n    start_response('503 Service Unavailable', [])\n    return [b'']",
        "'503 Service Unavailable'",
    ),
    "an end of its thread": ("import sys\ndef app(environ, start_response): sys.exit()", "SystemExit()"),
    "no answer": (
        "import time\n"
        "from loom.server import check\n"
        "check.SECONDS = 0.5\n"
        "def app(environ, start_response): time.sleep(60)",
        "'no answer within 0.5 s'",
    ),
}


class Broken:
    """The module that gunicorn loads, and how many of the next workers it breaks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.options = {"app": "module_of_the_test:app", "env": {"PYTHONPATH": str(folder)}}

    def write(self, fault: str, workers: int) -> None:
        code = textwrap.indent(FAULTS[fault][0], "    ")
        (self._folder / "module_of_the_test.py").write_text(MODULE.format(fault=code))
        self.workers = workers

    @property
    def workers(self) -> int:
        return int((self._folder / "broken").read_text())

    @workers.setter
    def workers(self, count: int) -> None:
        (self._folder / "broken").write_text(str(count))


@pytest.fixture
def broken(tmp_path: Path) -> Broken:
    return Broken(tmp_path)


def said(cluster: Cluster, event: str) -> list[dict[str, Any]]:
    """The lines of instance 0's log with this event."""
    whole_lines = cluster.masters[0].log.read_text(errors="replace").rpartition("\n")[0]  # one may be half written
    lines = whole_lines.splitlines()
    return [
        line for line in map(json.loads, filter(lambda line: line.startswith("{"), lines)) if line["event"] == event
    ]


def failure(cluster: Cluster, number: int) -> dict[str, Any]:
    """Wait until the worker with this number, from 0, has logged that it cannot serve, and return that line."""
    wait_until(lambda: len(said(cluster, "cannot-serve")) > number)
    return said(cluster, "cannot-serve")[number]


def gone(sql: Sql, pid: int) -> bool:
    """Whether the registry has no row of this process."""
    return sql("SELECT 1 FROM instances WHERE (metadata->>'pid')::int = %s", pid) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_three_workers_in_a_row_that_cannot_serve_end_gunicorn_with_the_reason(
    start_cluster: Callable[..., Cluster], broken: Broken, sql: Sql, fault: str
) -> None:
    broken.write(fault, 0)
    cluster = start_cluster(1, **broken.options)
    broken.workers = 1000
    cluster.kill(0)
    for number in range(3):
        wait_until(partial(gone, sql, failure(cluster, number)["pid"]))
    assert cluster.masters[0].wait(20) == 3
    assert broken.workers == 1000 - 3
    reasons = {line["reason"] for line in said(cluster, "cannot-serve")}
    assert reasons == {f"GET /health/live: {FAULTS[fault][1]}"}
    end = f"Reason: 3 workers in a row could not serve: {reasons.pop()}"
    assert len(said(cluster, end)) == 1
    assert sql("SELECT status FROM instances WHERE status <> 'dead'") == []


def test_a_worker_that_cannot_serve_is_replaced_and_one_that_can_resets_the_count(
    start_cluster: Callable[..., Cluster], broken: Broken, sql: Sql
) -> None:
    broken.write("an exception", 2)
    cluster = start_cluster(1, **broken.options)
    for number in (1, 3):  # the second of two in a row
        failure(cluster, number)
        cluster.wait_healthy(1)
        assert len(said(cluster, "cannot-serve")) == number + 1
        broken.workers = 2
        cluster.kill(0)
    failure(cluster, 5)
    cluster.wait_healthy(1)
    assert cluster.client(0).post("/api/v1/locks/x", {}).status == 201
    assert sql("SELECT count(*) FROM instances WHERE status = 'active'") == [(1,)]


def test_gunicorn_reports_once_that_several_workers_cannot_serve(
    start_cluster: Callable[..., Cluster], broken: Broken, sql: Sql
) -> None:
    broken.write("a status", 1000)
    with pytest.raises(AssertionError, match="Reason: 3 workers in a row could not serve") as caught:
        start_cluster(1, config="server: {workers: 4}\n", **broken.options)
    assert "Traceback" not in str(caught.value)
    assert sql("SELECT 1 FROM instances") == []
