"""One Idempotency-Key is applied once, whichever instances it reaches and whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2.extensions
import pytest
from harness import Client, Cluster, wait_until
from harness.client import Answer
from harness.locks import LOCKS, Sql

ROUNDS = 50
THINGS = """
import uuid

from app import app
from loom import db
from loom.http import answer, idempotency

@app.post("/things/<int:n>")
def make(n):
    def work(conn):
        db.run(conn, "INSERT INTO things VALUES (%(n)s)", n=n)
        return answer.json({"made": str(uuid.uuid4())}, 201)

    return idempotency.once(work)
"""


@pytest.fixture
def cluster(start_cluster: Callable[..., Cluster], sql: Sql, tmp_path: Path) -> Cluster:
    """Two instances with one more route, which writes a row."""
    sql("CREATE TABLE things (n int)")
    (tmp_path / "things.py").write_text(THINGS)
    return start_cluster(2, app="things:app", env={"PYTHONPATH": str(tmp_path)})


def keyed(client: Client, path: str, key: str, body: Any = None) -> Answer | None:
    """None: its instance died."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return client.post(path, body, headers={"Idempotency-Key": key})
    return None


def settled(client: Client, path: str, key: str) -> Answer:
    """Asks, with pauses, until another twin is no longer in flight."""

    def ask() -> Answer | None:
        answer = keyed(client, path, key)
        assert answer is not None
        return None if answer.status == 409 and answer.json["type"] == "/problems/in-progress" else answer

    return wait_until(ask)


def test_a_key_sent_to_two_instances_at_once_is_applied_once(cluster: Cluster, sql: Sql) -> None:
    clients = [cluster.client(i) for i in range(2)]
    start = threading.Barrier(2)

    def send(client: Client, path: str, key: str) -> Answer:
        start.wait()
        answer = keyed(client, path, key)
        assert answer is not None
        return answer

    with ThreadPoolExecutor(2) as threads:
        for n in range(ROUNDS):
            path, key = f"/things/{n}", f"key-{n}"
            answers = list(threads.map(lambda c, p=path, k=key: send(c, p, k), clients))
            assert 201 in [a.status for a in answers]
            assert [a.status for a in answers if a.status != 201] in ([], [409])
            answers = [a for a in answers if a.status == 201] + [settled(c, path, key) for c in clients]
            assert len({a.body for a in answers}) == 1
            taken = list(threads.map(lambda c, n=n, k=key: send(c, f"{LOCKS}{n}", k), clients))
            assert {a.status for a in taken} <= {200, 201}
            assert len({a.json["fencing_token"] for a in taken}) == 1
    assert sql("SELECT n, count(*) FROM things GROUP BY n ORDER BY n") == [(n, 1) for n in range(ROUNDS)]
    assert sql("SELECT count(*) FROM distributed_locks WHERE lock_name ~ '^[0-9]+$'") == [(ROUNDS,)]
    assert sql("SELECT count(*) FROM grants WHERE lock_name ~ '^[0-9]+$'") == [(0,)]


def test_a_worker_killed_in_the_middle_of_a_request_leaves_its_key_to_a_retry(
    cluster: Cluster, sql: Sql, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    blocker, other = session(), cluster.client(1)
    blocker.cursor().execute("LOCK TABLE things IN SHARE MODE")
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(keyed, cluster.client(0), "/things/1", "k")
        wait_until(lambda: sql("SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'things'::regclass"))
        cluster.kill(0)
        assert first.result(10) is None
    twin = keyed(other, "/things/1", "k")
    assert twin is not None
    assert twin.json["type"] == "/problems/in-progress"
    blocker.rollback()
    assert settled(other, "/things/1", "k").status == 201
    assert sql("SELECT count(*) FROM things") == [(1,)]
    cluster.wait_serving(0)


def test_a_worker_killed_at_any_moment_has_applied_a_key_once_or_never(cluster: Cluster, sql: Sql, seed: int) -> None:
    rng, rounds = random.Random(seed), 20
    with ThreadPoolExecutor(1) as threads:
        for n in range(rounds):
            path, name, key = f"/things/{n}", f"{LOCKS}{n}", f"key-{n}"
            client = cluster.client(0)
            cluster.wait_serving(0)
            keyed(client, "/things/1000", "warm")
            first = threads.submit(lambda c=client, p=path, m=name, k=key: (keyed(c, p, k), keyed(c, m, k)))
            time.sleep(rng.uniform(0, 0.01))
            cluster.kill(0)
            thing, grant = first.result(10)
            again = settled(cluster.client(1), path, key)
            assert again.status == 201
            assert thing is None or thing.body == again.body
            regrant = settled(cluster.client(1), name, key)
            assert regrant.status in (200, 201)
            assert grant is None or grant.json["fencing_token"] == regrant.json["fencing_token"]
    assert sql("SELECT n, count(*) FROM things WHERE n < 1000 GROUP BY n ORDER BY n") == [(n, 1) for n in range(rounds)]
    assert sql("SELECT count(*) FROM distributed_locks WHERE lock_name ~ '^[0-9]+$'") == [(rounds,)]
    assert sql("SELECT count(*) FROM grants WHERE lock_name ~ '^[0-9]+$'") == [(0,)]
