"""A restart of each instance in turn loses no request, whatever its method."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import pytest
from harness import Cluster, wait_until
from harness.client import Answer
from harness.load import Load, get, use_lock
from harness.locks import BUILD, Sql, acquire

# Each job has its own lock: a 409 because another job holds it would look like a failure.
JOBS = [get("/api/v1/locks"), get("/health/live")] * 2 + [use_lock(f"used-{i}") for i in range(8)]
ROUND = 15.0  # seconds within which an instance that is in use has restarted


def ids(cluster: Cluster) -> set[str]:
    return {health["instance_id"] for i in range(3) if (health := cluster.health(i))}


def test_restarts_and_reloads_for_a_minute_lose_no_request(
    start_cluster: Callable[..., Cluster], sql: Sql, long: bool
) -> None:
    if not long:
        pytest.skip("tests/cluster/test_drain.py has the short one; this needs --long")
    cluster = start_cluster(3, nginx=True)
    cluster.wait_healthy()
    with Load([cluster.nginx_url], JOBS, pause=0.005) as load:
        for i in [0, 1, 2] * 5:
            before, started = ids(cluster), time.monotonic()
            cluster.restart(i)
            assert time.monotonic() - started < ROUND
            assert len(ids(cluster) - before) == 1
        for master in cluster.masters:
            before = ids(cluster)
            master.send(signal.SIGHUP)
            wait_until(lambda known=before: len(after := ids(cluster)) == 3 and after != known, ROUND)
    print(f"{load.statuses()}, slowest {max(call.seconds for call in load.calls):.2f} s")
    assert [call for call in load.calls if call.status not in (200, 201, 204)] == []
    assert len(load.calls) > 5000
    assert sql("SELECT count(*) FROM instances") == [(3,)], "a row was left behind"
    assert sql("SELECT count(*) FROM distributed_locks WHERE lock_name LIKE 'used-%%'") == [(0,)]


def test_a_restart_answers_waiters_and_keeps_their_places(start_cluster: Callable[..., Cluster], sql: Sql) -> None:
    cluster = start_cluster(2)
    token = acquire(cluster.client(1), ttl_seconds=60)["fencing_token"]
    answers: list[Answer] = []

    def wait(i: int, owner: str, seconds: int) -> None:
        answers.append(cluster.client(i).post(BUILD, {"owner": owner, "wait_seconds": seconds}))

    first = threading.Thread(target=wait, args=(0, "first", 30))
    second = threading.Thread(target=wait, args=(1, "second", 30))
    first.start()
    wait_until(lambda: sql("SELECT owner FROM lock_waiters") == [("first",)])
    second.start()
    wait_until(lambda: sql("SELECT count(*) FROM lock_waiters") == [(2,)])
    cluster.masters[0].send(signal.SIGTERM)
    first.join(10)
    assert not first.is_alive(), "the restart waits for the waiters"
    assert answers.pop().status == 409
    again = threading.Thread(target=wait, args=(1, "first", 5))
    again.start()
    time.sleep(0.3)
    cluster.client(1).delete(f"{BUILD}?fencing_token={token}")
    again.join()
    granted = answers.pop()
    assert (granted.status, granted.json["owner"]) == (201, "first")
    cluster.client(1).delete(f"{BUILD}?fencing_token={granted.json['fencing_token']}")
    second.join()
    assert answers.pop().json["owner"] == "second"
