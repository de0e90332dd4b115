"""Promise 6 under faults: no event is skipped or doubled when instances and the database die during the numbering."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
from harness import Cluster, Postgres, wait_until
from harness.feed import Follower, assert_in_order, differences, follow, read, replay
from harness.load import Caller, Load
from harness.processes import stopped

NUMBERING = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%number_events%'"
    " AND wait_event_type = 'Lock'"
)
UNNUMBERED = "SELECT (SELECT max(place) FROM events) - (SELECT max(place) FROM event_numbers)"


def change_beads(i: int, seed: int, acknowledged: dict[tuple[str, int], dict[str, Any]]) -> Callable[[Caller], None]:
    """A job that creates and changes beads, and records each acknowledged version."""
    chance, mine = random.Random(f"{seed}/{i}"), list[str]()

    def job(call: Caller) -> None:
        if len(mine) < 10 or chance.random() < 0.1:
            answer = call("POST", "/api/v1/beads", {"title": "T", "project_id": "p"})
        else:
            what = {"priority": chance.randrange(4), "context": {"k": str(chance.random())}}
            answer = call("PATCH", f"/api/v1/beads/{chance.choice(mine)}", what)
        if answer is not None and answer.status in (200, 201):
            bead = answer.json
            acknowledged[bead["id"], bead["version"]] = bead
            if bead["version"] == 1:
                mine.append(bead["id"])

    return job


@contextlib.contextmanager
def numbering(postgres: Postgres, name: str) -> Iterator[int]:
    """Yield the pid of a back end that is blocked while it numbers: some rows are written and none is committed."""
    with (
        contextlib.suppress(psycopg2.OperationalError),
        contextlib.closing(psycopg2.connect(postgres.dsn(name))) as conn,
    ):
        with conn.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(own_locks(), 1)")
            wait_until(lambda: postgres.query(UNNUMBERED, database=name)[0][0] > 9)
            cursor.execute("INSERT INTO event_numbers SELECT max(id) + 5, -1 FROM event_numbers")
            cursor.execute("SELECT pg_advisory_unlock(own_locks(), 1)")
        yield wait_until(lambda: postgres.query(NUMBERING, database=name), 10, 0.01)[0][0]


def test_no_event_is_skipped_or_doubled_whatever_dies(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster], seed: int, long: bool
) -> None:
    name = own_postgres.database()
    own_postgres.query("INSERT INTO projects (id, name) VALUES ('p', 'P')", database=name)
    cluster = start_cluster(3, dsn=own_postgres.dsn(name, tcp=True))
    cluster.wait_healthy()
    acknowledged: dict[tuple[str, int], dict[str, Any]] = {}
    readers = [Follower(cluster.ports, i) for i in range(3)]
    for reader in readers:
        reader.start()
    with Load(cluster.ports, [change_beads(i, seed, acknowledged) for i in range(6)], pause=0.005):
        for _ in range(5 if long else 1):
            time.sleep(1)
            with numbering(own_postgres, name) as pid:  # the server ends all its sessions and recovers
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.5)
            cluster.wait_healthy()
            time.sleep(1)
            cluster.kill(random.Random(seed).randrange(3))
            with numbering(own_postgres, name) as pid, stopped([pid]):
                time.sleep(2)
            cluster.wait_healthy()
            time.sleep(1)
            with numbering(own_postgres, name):
                own_postgres.kill()
            own_postgres.start()
            cluster.wait_healthy()
            time.sleep(1)
    for reader in readers:
        reader.stop()

    client = cluster.client()
    everything = list(follow(client, limit=1000))
    print(f"{len(everything)} events, longest answer {max(reader.longest for reader in readers):.1f} s")
    assert len(everything) > 200
    assert own_postgres.query("SELECT count(*) FROM events", database=name) == [(len(everything),)]
    assert_in_order(everything)
    for reader in readers:
        assert reader.seen == everything
        assert reader.longest < 7, "5 s beyond the wait that it asked for"
    told = {(event["entity_id"], event["version"]) for event in everything}
    assert set(acknowledged) <= told, "acknowledged, and not in the feed"
    entities = replay(everything)
    for bead in client.get("/api/v1/beads").json:
        assert differences(entities["bead", bead["id"]], bead) == {}
    assert read(client, everything[-1]["id"]) == ([], everything[-1]["id"])
