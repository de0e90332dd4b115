"""`with locks.hold(...)` keeps a lock for as long as the work takes, and reports at once when it is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg2.extensions
import pytest
from harness import MARGIN, AppClient, wait_until
from harness.locks import BUILD, Sql, acquire, force

from loom import db, errors, locks

Session = Callable[[], psycopg2.extensions.connection]

pytestmark = pytest.mark.usefixtures("database")
NAME_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('build', 0))"
HOLDS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'loom hold'"


def ended_how(sql: Sql) -> list[str]:
    return [how for (how,) in sql("SELECT ended_how FROM grants WHERE lock_name = 'build' ORDER BY fencing_token")]


def test_the_guides_example_in_python(sql: Sql) -> None:
    with locks.hold("build", ttl=30) as lock:
        ((name, owner, token, lasts),) = sql(
            "SELECT lock_name, owner, fencing_token, expires_at - heartbeat_at FROM distributed_locks"
        )
        assert (name, owner, token, lasts) == ("build", lock.owner, lock.fencing_token, timedelta(seconds=30))
        assert not lock.lost
        lock.ensure()
    assert sql("SELECT 1 FROM distributed_locks") == []
    assert ended_how(sql) == ["released"]


def test_a_lock_is_kept_for_as_long_as_the_work_takes(sql: Sql, database: db.Database) -> None:
    with locks.hold("build", ttl=1, metadata={"why": "long work"}) as lock:
        for _ in range(5):
            sql("SELECT pg_sleep(0.5)")
            with database.connection() as conn:
                attempt = locks.acquire(conn, "build", "b", timedelta(seconds=1))
            assert attempt.outcome == "held"
            assert attempt.grant is not None
            assert (attempt.grant.fencing_token, attempt.grant.metadata) == (lock.fencing_token, {"why": "long work"})
        lock.ensure()
    assert ended_how(sql) == ["released"]


def test_a_block_that_raises_releases_the_lock(sql: Sql) -> None:
    with pytest.raises(ZeroDivisionError), locks.hold("build", ttl=30):
        raise ZeroDivisionError
    assert ended_how(sql) == ["released"]


def test_no_connection_or_thread_is_left_afterwards(sql: Sql) -> None:
    threads = threading.active_count()
    for _ in range(3):
        with locks.hold("build", ttl=30):
            assert sql(HOLDS) == [(1,)]
    wait_until(lambda: sql(HOLDS) == [(0,)])
    wait_until(lambda: threading.active_count() <= threads)


def test_a_lock_held_by_another_raises_lock_held_with_the_holder(client: AppClient) -> None:
    acquire(client, owner="a")
    with pytest.raises(errors.LockHeld) as held, locks.hold("build", ttl=30):
        pytest.fail("entered")
    assert held.value.members["holder"].owner == "a"


def test_a_hold_that_waits_gets_the_lock_when_it_is_released(client: AppClient, sql: Sql) -> None:
    token = acquire(client, owner="a")["fencing_token"]
    threading.Timer(0.3, client.delete, (f"{BUILD}?fencing_token={token}",)).start()
    with locks.hold("build", ttl=30, wait=10, owner="b") as lock:
        assert lock.fencing_token > token
        assert sql("SELECT owner FROM distributed_locks") == [("b",)]


def test_a_wait_that_ends_without_the_lock_raises_in_time(client: AppClient) -> None:
    acquire(client, owner="a")
    started = time.monotonic()
    with pytest.raises(errors.LockHeld), locks.hold("build", ttl=30, wait=0.5):
        pytest.fail("entered")
    assert 0.5 <= time.monotonic() - started < 0.5 + MARGIN


def hold_until_lost(end: Callable[[locks.Hold], object], **options: Any) -> float:
    """Hold the lock, end its grant, and return how many seconds passed until the holder was told."""
    told = threading.Event()

    def work() -> float:
        with locks.hold("build", on_lost=told.set, **options) as lock:
            end(lock)
            started = time.monotonic()
            assert told.wait(10)
            seconds = time.monotonic() - started
            assert lock.lost
            with pytest.raises(errors.LockLost):
                lock.ensure()
            result.append(seconds)
        return seconds

    result: list[float] = []
    with pytest.raises(errors.LockLost) as lost:
        work()
    assert lost.value.members["lock_name"] == "build"
    return result[0]


def test_a_holder_learns_of_a_forced_release_at_its_next_renewal(client: AppClient, sql: Sql) -> None:
    seconds = hold_until_lost(lambda lock: force(client, lock.fencing_token), ttl=3)
    assert seconds < 2.5, "a third of the TTL, not the whole of it"
    assert ended_how(sql) == ["forced"]


def test_a_holder_learns_that_its_row_was_deleted_and_does_not_revive_it(sql: Sql) -> None:
    seconds = hold_until_lost(lambda lock: sql("DELETE FROM distributed_locks"), ttl=3)
    assert seconds < 2.5
    assert sql("SELECT 1 FROM distributed_locks") == []
    assert ended_how(sql) == ["forced"]


def test_a_lost_hold_does_not_end_the_next_grant(client: AppClient, sql: Sql) -> None:
    def take_over(lock: locks.Hold) -> None:
        force(client, lock.fencing_token)
        acquire(client, owner="b")

    hold_until_lost(take_over, ttl=1)
    assert client.get(BUILD).json["owner"] == "b"
    assert ended_how(sql) == ["forced"]


def test_a_loss_before_the_next_renewal_raises_at_the_end_of_the_block(client: AppClient) -> None:
    def work() -> None:
        with locks.hold("build", ttl=60) as lock:
            force(client, lock.fencing_token)

    with pytest.raises(errors.LockLost):
        work()


def test_an_exception_in_the_block_is_not_replaced_by_lock_lost(client: AppClient) -> None:
    def work() -> None:
        with locks.hold("build", ttl=60) as lock:
            force(client, lock.fencing_token)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


def test_a_holder_trusts_its_lock_only_for_the_ttl_from_when_it_sent_the_request(session: Session, sql: Sql) -> None:
    """The answer comes late, and no renewal succeeds: at the end of the TTL the holder must have stopped."""
    told = threading.Event()
    first, second = session(), session()
    first.cursor().execute(NAME_LOCK)
    blocker = threading.Thread(target=lambda: second.cursor().execute(NAME_LOCK))

    def let_through() -> None:
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_until(lambda: sql(waits) == [(1,)])
        blocker.start()  # queues behind the holder's acquire and before its renewals
        wait_until(lambda: sql(waits) == [(2,)])
        sql("SELECT pg_sleep(1.7)")
        first.rollback()

    threading.Thread(target=let_through).start()
    asked = time.monotonic()

    def work() -> None:
        with locks.hold("build", ttl=2, on_lost=told.set):
            assert told.wait(10)

    with pytest.raises(errors.LockLost):
        work()
    assert time.monotonic() - asked < 3.6, "by the database it holds the lock for longer"
    blocker.join()
    second.rollback()


def test_a_fenced_write_in_a_hold_fails_once_the_lock_is_lost(
    sql: Sql, database: db.Database, client: AppClient
) -> None:
    sql("CREATE TABLE work (token bigint)")

    def write(lock: locks.Hold) -> None:
        with database.transaction() as conn:
            locks.check(conn, lock.name, lock.fencing_token)
            db.run(conn, "INSERT INTO work VALUES (%(token)s)", token=lock.fencing_token)

    def work() -> None:
        with locks.hold("build", ttl=60) as lock:
            write(lock)
            force(client, lock.fencing_token)
            write(lock)

    with pytest.raises(errors.LockLost):
        work()
    assert len(sql("SELECT token FROM work")) == 1


def test_holds_of_many_threads_exclude_each_other(sql: Sql) -> None:
    inside, most, rounds = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, rounds
        for _ in range(3):
            with locks.hold("build", ttl=5, wait=30):
                inside += 1
                most = max(most, inside)
                time.sleep(0.01)
                inside -= 1
                rounds += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, rounds) == (1, 12)
    assert ended_how(sql) == ["released"] * 12
