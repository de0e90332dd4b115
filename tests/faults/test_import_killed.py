"""An import with --resume is killed at any moment, or runs beside instances that serve: no row is lost or twice."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import MARGIN, Cluster, Postgres, imports, legacy, wait_until
from harness.postgres import query

from loom import config

Sql = Callable[..., list[tuple[Any, ...]]]
COMPARED = (*imports.TABLES[:-1], "bead_blockers")
EVENTS = "SELECT type, entity_id, version, project_id, changes - 'imported_from' FROM events ORDER BY 1, 2, 3"


@pytest.fixture
def other(postgres: Postgres) -> Iterator[str]:
    name = postgres.database()
    yield postgres.dsn(name)
    postgres.drop(name)


def large(folder: Path, size: int) -> tuple[Path, Path]:
    """A database and a folder of beads that take some seconds in small batches."""
    rows = legacy.some()
    rows["agents"] += [{"id": f"agent {n}", "name": str(n), "started_at": legacy.NOW} for n in range(size)]
    rows["bead_comments"] += [
        {"id": f"k{n}", "bead_id": f"b-{n}", "parent_id": f"k{n - 1}" if n % 9 else "", "created_at": legacy.NOW}
        for n in range(size)
    ]
    legacy.database(folder / "old.db", rows).close()
    (folder / ".beads").mkdir()
    beads = [
        {"id": f"b-{n}", "title": str(n), "created_at": "2026-01-20T08:00:00Z",
         "status": "closed" if n % 3 else "open",
         "dependencies": [{"depends_on_id": f"b-{n * 7 % size}"},
                          {"depends_on_id": f"b-{n // 2}", "type": "parent-child"}]}
        for n in range(size)
    ]  # fmt: skip
    (folder / ".beads/issues.jsonl").write_text("".join(json.dumps(bead) + "\n" for bead in beads))
    return folder / "old.db", folder / ".beads"


def start(dsn: str, database: Path, beads: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "loom", "import-sqlite", str(database), "--beads", str(beads), "--resume"]
    return subprocess.Popen(
        command, env=config.environment(DATABASE_DSN=dsn), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def state(dsn: str) -> dict[str, list[tuple[Any, ...]]]:
    found = {table: query(dsn, f"SELECT t::text FROM {table} t ORDER BY 1") for table in COMPARED}
    return {**found, "events": query(dsn, EVENTS)}


def written(dsn: str) -> int:
    return query(dsn, "SELECT count(*) FROM events WHERE type LIKE '%.imported'")[0][0]


def test_an_import_that_is_killed_and_run_again_equals_an_undisturbed_one(
    dsn: str, other: str, tmp_path: Path, seed: int, long: bool
) -> None:
    chance = random.Random(seed)
    database, beads = large(tmp_path, 4000 if long else 1500)
    assert start(other, database, beads).wait() == 0
    everything = written(other)
    kills = 50 if long else 4
    points = sorted(chance.sample(range(1, everything * 2 // 3), kills - 2))
    partly = 0
    for point in [0, 0, *points]:  # twice before anything is written, at any time
        with start(dsn, database, beads) as running:
            if point:
                wait_until(lambda at=point: written(dsn) >= at or running.poll() is not None, 60, 0.002)
            else:
                time.sleep(chance.uniform(0.1, 1.0))
            running.kill()
        partly += 0 < written(dsn) < everything
    assert partly > 0, "no kill came while rows were written"
    last = start(dsn, database, beads)
    output = last.communicate()[0].decode()
    assert last.returncode == 0, output
    assert state(dsn) == state(other)
    assert query(dsn, "SELECT count(*) FROM imports") == [(0,)]


def test_an_import_beside_instances_stalls_no_request(dsn: str, cluster: Cluster, tmp_path: Path, sql: Sql) -> None:
    """While it runs, agents go on claiming; no request takes longer than on a quiet cluster, and 100 ms."""
    client = cluster.client()
    client.post("/api/v1/projects", {"id": "live", "name": "Live", "git_repo": "r", "branch": "b"})
    client.post("/api/v1/agents", {"id": "worker", "persona_name": "x", "project_id": "live"})
    database, beads = large(tmp_path, 1500)
    slowest, ended = [0.0], threading.Event()

    def work() -> None:
        while not ended.is_set():
            for call in (
                lambda: client.post("/api/v1/beads", {"title": "t", "project_id": "live"}),
                lambda: client.post("/api/v1/beads/claim", {"agent_id": "worker", "project_id": "live"}),
                lambda: client.put("/api/v1/config/theme-of-worker", {"value": time.time()}),
            ):
                began = time.monotonic()
                answer = call()
                slowest[0] = max(slowest[0], time.monotonic() - began)
                if answer.status == 200 and "fencing_token" in answer.json:
                    bead, token = answer.json["bead"]["id"], answer.json["fencing_token"]
                    client.post(f"/api/v1/beads/{bead}/complete", {"fencing_token": token})

    thread = threading.Thread(target=work)
    thread.start()
    try:
        running = start(dsn, database, beads)
        output = running.communicate()[0].decode()
    finally:
        ended.set()
        thread.join()
    assert running.returncode == 0, output
    assert slowest[0] < 0.1 + MARGIN
    assert sql("SELECT count(*) FROM beads WHERE id LIKE 'b-%'") == [(1500,)]
    assert sql("SELECT count(*) FROM events WHERE type = 'bead.imported'") == [(1500,)]
