"""Rows removed by hand, under load: holders are told, no grant is revived, and the history is complete."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

import pytest
from harness import Cluster, wait_until
from harness.history import assert_one_holder, grants
from harness.load import Job, Load, use_lock
from harness.locks import BUILD, LOCKS, Sql, acquire, assert_lost

# As the guide shows them.
CLEAN_LOCKS = """
DELETE FROM distributed_locks
WHERE expires_at < NOW();
"""
CLEAN_INSTANCES = """
DELETE FROM instances
WHERE last_heartbeat < NOW() - INTERVAL '5 minutes';
"""


def renew(token: int) -> Job:
    return lambda call: call("PUT", BUILD, {"fencing_token": token, "ttl_seconds": 60})


def leave_to_expire(name: str) -> Job:
    """A job that acquires a lock for a second and does not release it."""
    return lambda call: call("POST", LOCKS + name, {"ttl_seconds": 1, "wait_seconds": 5})


@pytest.mark.parametrize(
    "by_hand",
    [
        "TRUNCATE distributed_locks",
        "TRUNCATE distributed_locks RESTART IDENTITY CASCADE",
        "DELETE FROM distributed_locks WHERE lock_name = 'build'",
    ],
)
def test_a_holder_learns_that_its_row_was_removed_and_nothing_revives_it(
    start_cluster: Callable[..., Cluster], sql: Sql, by_hand: str
) -> None:
    cluster = start_cluster(2)
    token = acquire(cluster.client(0), ttl_seconds=60)["fencing_token"]
    others = [use_lock(f"other-{i % 2}") for i in range(4)]
    with Load(cluster.ports, [*[renew(token)] * 6, *others], pause=0) as load:
        wait_until(lambda: load.statuses()[200] > 100)
        asked = time.monotonic()
        sql(by_hand)
        done = time.monotonic()
        wait_until(lambda: len(load.between(done)) > 200)
    renewals = [call for call in load.calls if call.what == f"PUT {BUILD}"]
    assert {call.status for call in renewals if call.ended < asked} == {200}
    assert {call.status for call in renewals if call.at > done} == {409}
    told = min(call.ended for call in renewals if call.status == 409)
    assert all(call.status == 409 for call in renewals if call.at > told), "revived"
    assert set(load.statuses()) <= {200, 201, 204, 409}

    client = cluster.client(1)
    assert client.get(BUILD).status == 404
    assert_lost(client.put(BUILD, {"fencing_token": token, "ttl_seconds": 60}), "forced")
    assert_lost(client.delete(f"{BUILD}?fencing_token={token}"), "forced")
    heir = acquire(client, owner="heir")
    assert_lost(client.put(BUILD, {"fencing_token": token, "ttl_seconds": 60}), "forced", holder="heir")
    client.delete(f"{BUILD}?fencing_token={heir['fencing_token']}")
    for name in ("build", "other-0", "other-1"):
        past = grants(sql, name)
        assert_one_holder(past)
        assert past[-1].ended_how is not None
        assert {grant.ended_how for grant in past} <= {"released", "forced"}
    assert [grant.ended_how for grant in grants(sql, "build")] == ["forced", "released"]


def test_the_guides_two_deletes_break_no_promise_under_load(
    start_cluster: Callable[..., Cluster], sql: Sql, long: bool
) -> None:
    cluster = start_cluster(2)
    cluster.wait_healthy()
    ids = {cluster.health(i)["instance_id"] for i in range(2)}  # type: ignore[index]
    stale = str(uuid.uuid4())
    sql(
        "INSERT INTO instances (instance_id, hostname, last_heartbeat) VALUES (%s, 'gone', now() - interval '6 min')",
        stale,
    )
    sql("SELECT acquire_lock('of-the-stale', %s, %s, '1 hour', NULL, false)", f"instance:{stale}", stale)
    jobs = [leave_to_expire(f"left-{i % 2}") for i in range(4)] + [use_lock(f"used-{i}") for i in range(4)]
    with Load(cluster.ports, jobs) as load:
        end = time.monotonic() + (30 if long else 4)
        while time.monotonic() < end:
            sql(CLEAN_LOCKS)
            sql(CLEAN_INSTANCES)
            time.sleep(0.02)
    assert set(load.statuses()) <= {200, 201, 204, 409}
    used = [call for call in load.calls if "used-" in call.what]
    assert {call.status for call in used} == {200, 201, 204}, "a lock was lost that had not expired"
    for i in range(2):
        past = grants(sql, f"left-{i}")
        assert_one_holder(past)
        assert len(past) > 2
        assert {grant.ended_how for grant in past[:-1]} == {"expired"}
    assert {str(row[0]) for row in sql("SELECT instance_id FROM instances")} == ids
    assert [grant.ended_how for grant in grants(sql, "of-the-stale")] == ["owner-died"]
