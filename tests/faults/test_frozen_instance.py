"""An instance that was frozen for a while learns what happened meanwhile, and has blocked nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from harness import MARGIN, Cluster, wait_until
from harness.client import Answer
from harness.history import grants
from harness.locks import BUILD, LOCKS, Sql, acquire, release
from harness.processes import stopped


def test_an_instance_removed_while_frozen_comes_back_with_a_new_id(
    start_cluster: Callable[..., Cluster], sql: Sql
) -> None:
    cluster = start_cluster(2)
    cluster.wait_healthy()
    before = cluster.health(0)
    assert before is not None
    sql("SELECT acquire_lock('own', %s, %s, '1 hour', NULL, false)", f"instance:{before['instance_id']}", None)
    with cluster.frozen(0):
        sql("DELETE FROM instances WHERE instance_id = %s", before["instance_id"])
        assert cluster.health(1)["active_instances"] == 1  # type: ignore[index]
        assert [grant.ended_how for grant in grants(sql, "own")] == ["owner-died"]
        time.sleep(6)  # its next heartbeat is due
    wait_until(lambda: (after := cluster.health(0)) and after["instance_id"] != before["instance_id"], 2 + MARGIN)
    cluster.wait_healthy(timeout=2 + MARGIN)
    assert sql("SELECT 1 FROM instances WHERE instance_id = %s", before["instance_id"]) == []
    cluster.kill(0)
    wait_until(lambda: sql("SELECT count(*) FROM instances WHERE status = 'dead'") == [(1,)])


def test_a_request_sent_to_a_frozen_instance_is_served_under_its_new_id(
    start_cluster: Callable[..., Cluster], sql: Sql, long: bool
) -> None:
    """A host that sleeps for more than 30 s, and is declared dead meanwhile."""
    if not long:
        pytest.skip("sleeps for 32 s: --long")
    cluster = start_cluster(1)
    before = cluster.health(0)
    assert before is not None
    answers: list[Answer] = []
    request = threading.Thread(target=lambda: answers.append(cluster.client(0).post(BUILD)))
    with stopped([cluster.master(0)]):
        with stopped([cluster.pid(0)]):
            request.start()
            sql("UPDATE instances SET status = 'dead'")
            time.sleep(32)
        request.join(5)
        time.sleep(1.5)  # otherwise its master would kill it as hung
    (answer,) = answers
    assert answer.status == 201
    after = cluster.health(0)
    assert after is not None
    assert answer.json["instance_id"] == after["instance_id"] != before["instance_id"]
    assert sql("SELECT status FROM instances ORDER BY started_at") == [("dead",), ("active",)]


def test_a_waiter_at_a_frozen_instance_is_skipped(cluster: Cluster, sql: Sql) -> None:
    token = acquire(cluster.client(2), ttl_seconds=60)["fencing_token"]
    answers: dict[str, Answer] = {}

    def wait(i: int, owner: str) -> threading.Thread:
        body = {"owner": owner, "wait_seconds": 30, "ttl_seconds": 30}
        thread = threading.Thread(target=lambda: answers.update({owner: cluster.client(i).post(BUILD, body)}))
        thread.start()
        wait_until(lambda: sql("SELECT 1 FROM lock_waiters WHERE owner = %s", owner))
        return thread

    threads = [wait(0, "frozen"), wait(1, "awake")]
    with cluster.frozen(0):
        time.sleep(2.1)  # a place lasts 2 s after its last request
        release(cluster.client(2), token)
        wait_until(lambda: "awake" in answers, 1 + MARGIN)
    assert answers["awake"].status == 201
    time.sleep(0.5)
    assert "frozen" not in answers
    release(cluster.client(2), answers["awake"].json["fencing_token"])
    wait_until(lambda: "frozen" in answers, 2 + MARGIN)
    assert answers["frozen"].status == 201
    assert answers["frozen"].json["fencing_token"] > answers["awake"].json["fencing_token"]
    for thread in threads:
        thread.join()


def test_the_own_locks_of_an_instance_end_when_it_is_killed(cluster: Cluster, sql: Sql) -> None:
    """Also when it was frozen before. A client's lock is kept."""
    for i, freeze in ((0, False), (1, True)):
        health = cluster.health(i)
        assert health is not None
        mine = f"instance:{health['instance_id']}"
        sql("SELECT acquire_lock('own', %s, %s, '1 hour', NULL, false)", mine, health["instance_id"])
        theirs = acquire(cluster.client(i), name=f"theirs-{i}", ttl_seconds=60)
        with stopped([cluster.pid(i)] if freeze else []):
            cluster.kill(i)
            wait_until(lambda n=i: [g.ended_how for g in grants(sql, "own")] == ["owner-died"] * (n + 1))
        renewal = {"fencing_token": theirs["fencing_token"], "ttl_seconds": 60}
        assert cluster.client(2).put(f"{LOCKS}theirs-{i}", renewal).status == 200
