"""Locks of `loom.client`, on real instances that are killed and frozen, and a database that restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from harness import MARGIN, Cluster, Postgres, wait_until
from harness.loom_client import client_of
from harness.postgres import query

from loom.client import Client, LockHeld, LockLost, Unreachable, errors


@pytest.fixture
def pair(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(2)


def test_a_lock_is_kept_while_its_instances_are_killed_and_frozen_and_the_next_holder_gets_a_larger_token(
    pair: Cluster,
) -> None:
    client = client_of(pair, attempt_timeout=1.0)
    told: list[str] = []
    with client.lock("deploy", ttl=4, on_lost=lambda: told.append("lost")) as lock:
        pair.kill(0)
        with pytest.raises(LockHeld) as held, client_of(pair, 1).lock("deploy"):
            pytest.fail("two holders")
        assert held.value.holder["owner"] == lock.owner
        pair.wait_serving(0)
        with pair.frozen(0):
            time.sleep(5)  # longer than the TTL
            lock.ensure()
        with pair.frozen(1):
            time.sleep(5)
            lock.ensure()
    assert told == []
    assert [grant.ended_how for grant in client.list_grants(lock_name="deploy")] == ["released"]
    with client.lock("deploy") as after:
        assert after.fencing_token > lock.fencing_token


def test_a_holder_that_reaches_no_instance_is_told_before_another_can_have_the_lock(pair: Cluster) -> None:
    told: list[float] = []
    client = client_of(pair, attempt_timeout=1.0)
    began = time.monotonic()
    lock = client.lock("deploy", ttl=3, on_lost=lambda: told.append(time.monotonic())).acquire()
    with pair.frozen(0), pair.frozen(1):
        wait_until(lambda: told, 3 + MARGIN)
        assert lock.lost
        with pytest.raises(LockLost):
            lock.ensure()
    assert told[0] - began <= 3 + 0.2  # the watch does not depend on the renewal that hangs
    with client_of(pair, 1).lock("deploy", wait=10) as after:
        assert after.fencing_token > lock.fencing_token
        with pytest.raises(LockLost):
            lock.release()
        after.ensure()


def test_a_holder_whose_grant_was_ended_by_force_is_told_and_does_not_take_the_lock_again(pair: Cluster) -> None:
    client, told = client_of(pair), threading.Event()
    lock = client.lock("deploy", ttl=3, on_lost=told.set).acquire()
    client.release_lock("deploy", lock.fencing_token, force=True, reason="test")
    assert told.wait(1 + MARGIN)
    assert client.get_lock("deploy") is None
    with pytest.raises(LockLost) as lost:
        lock.release()
    assert "forced" in str(lost.value)
    assert (lost.value.lock_name, lost.value.fencing_token) == ("deploy", lock.fencing_token)


def test_those_who_wait_get_the_lock_in_turn_and_none_of_their_leases_is_over_when_they_get_it(pair: Cluster) -> None:
    """The TTL counts from when the request was sent: with a wait that is longer than the TTL it is renewed at once."""
    order, inside = list[int](), threading.Semaphore(1)

    def one(number: int) -> None:
        with client_of(pair, number % 2).lock("deploy", ttl=2, wait=30) as lock:
            assert inside.acquire(blocking=False), "two holders"
            order.append(number)
            time.sleep(0.6)
            lock.ensure()
            inside.release()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda number=number: number == 0 or ((held := client_of(pair).get_lock("deploy")) and held.waiting))
        time.sleep(0.1)
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_lock_outlives_a_restart_of_the_database(
    start_cluster: Callable[..., Cluster], own_postgres: Postgres
) -> None:
    cluster = start_cluster(2, dsn=own_postgres.dsn(own_postgres.database()))
    client = client_of(cluster)
    with client.lock("deploy", ttl=20) as lock:
        own_postgres.kill()
        with pytest.raises((errors.Unavailable, Unreachable)):
            client.acquire_lock("other", owner="a", timeout=1.0)
        own_postgres.start()
        assert client.acquire_lock("other", owner="a").owner == "a"
        lock.ensure()
    assert lock.lost


def test_a_function_that_is_decorated_runs_only_under_its_lock(pair: Cluster) -> None:
    client = client_of(pair)

    @client.lock("nightly", ttl=5)
    def nightly() -> int:
        with pytest.raises(LockHeld):
            nightly()
        return 1

    assert nightly() == nightly() == 1


def test_a_call_without_an_answer_is_sent_again_and_done_once(pair: Cluster, dsn: str) -> None:
    client = client_of(pair, attempt_timeout=2.0, timeout=60.0)  # an attempt on a busy machine may take a second
    client.projects.create(id="p", name="p", git_repo="r", branch="main")
    with pair.frozen(0):
        thread = threading.Thread(target=pair.kill, args=(1,))
        thread.start()
        thread.join()
        made = client.beads.create(title="once", project_id="p")
    wait_until(lambda: pair.health(0) is not None)
    assert [bead["id"] for bead in client.beads.list(project_id="p")] == [made["id"]]
    assert query(dsn, "SELECT count(*) FROM beads") == [(1,)]


def test_an_error_has_the_members_of_its_problem(pair: Cluster) -> None:
    client = client_of(pair)
    with pytest.raises(errors.Invalid) as invalid:
        client.beads.create(title="t", project_id="nowhere", priority=9)
    assert invalid.value.errors[0]["field"]
    assert invalid.value.status == 400
    with pytest.raises(errors.NotFound) as absent:
        client.beads.get("bd-none")
    assert absent.value.request_id
    with pytest.raises(AttributeError, match="no member 'holder'"):
        _ = absent.value.holder
    with pytest.raises(Unreachable, match=r"GET /api/v1/beads"):
        list(Client("http://127.0.0.1:9", timeout=0.5).beads.list())
