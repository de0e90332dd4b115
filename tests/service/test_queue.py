"""Waiters get a lock in turn, and a waiter that has died or given up does not delay the others."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import psycopg2.extensions
import pytest
from flask import Flask
from harness import AppClient, wait_until
from harness.client import Answer
from harness.locks import BUILD, LOCKS, Sql, acquire, assert_problem, force, instant, release, wait_expired

from loom import db, locks
from loom.config import Config, DatabaseConfig, ServerConfig
from loom.instances import Instance
from loom.routes import create_app

Ask = Callable[..., "Future[Answer]"]

WAITERS = "SELECT owner FROM lock_waiters WHERE asked_at > clock_timestamp() - INTERVAL '2 seconds' ORDER BY place"
POLLERS = (
    "SELECT state_change FROM pg_stat_activity WHERE application_name = 'loom waiters' AND datname = current_database()"
)


def waiters(sql: Sql) -> list[str]:
    return [owner for (owner,) in sql(WAITERS)]


@pytest.fixture
def ask(client: AppClient, sql: Sql) -> Iterator[Ask]:
    """Requests a lock on a thread, and returns once that request waits."""
    with ThreadPoolExecutor(16) as threads:

        def start(owner: str, name: str = "build", wait: int = 20, by: AppClient = client) -> Future[Answer]:
            body = {"owner": owner, "wait_seconds": wait, "ttl_seconds": 30}
            future = threads.submit(by.post, LOCKS + name, body)
            wait_until(lambda: future.done() or owner in waiters(sql))
            return future

        yield start


def test_a_waiter_gets_the_lock_when_it_is_released(client: AppClient, ask: Ask, sql: Sql) -> None:
    held = acquire(client, owner="holder")
    waiting = ask("waiter")
    assert client.get(BUILD).json["waiting"] == 1
    assert client.post(BUILD, {"owner": "other"}).json["waiting"] == 1
    release(client, held["fencing_token"])
    answer = waiting.result(5)
    assert answer.status == 201
    assert answer.json["owner"] == "waiter"
    assert answer.json["fencing_token"] > held["fencing_token"]
    assert waiters(sql) == [], "the grant removes the place"
    assert client.get(BUILD).json["waiting"] == 0


def test_a_released_lock_is_granted_to_the_next_waiter_at_once_and_leaves_no_place(
    client: AppClient, ask: Ask, sql: Sql
) -> None:
    """A place that remains after its grant would block the lock for 2 s."""
    over = threading.Event()

    def release_others() -> None:  # each release makes the worker poll at once
        while not over.is_set():
            release(client, acquire(client, "other")["fencing_token"], "other")

    busy = threading.Thread(target=release_others)
    busy.start()
    try:
        delays, held = [], acquire(client, owner="first")
        for i in range(20):
            waiting = ask(f"waiter {i}")
            release(client, held["fencing_token"])
            answer = waiting.result(5).json
            ended = sql("SELECT ended_at FROM grants WHERE fencing_token = %s", held["fencing_token"])[0][0]
            delays.append((instant(answer["acquired_at"]) - ended).total_seconds())
            held = answer
    finally:
        over.set()
        busy.join()
    assert sql("SELECT owner FROM lock_waiters") == []
    assert sorted(delays)[10] < 1


def test_a_waiter_gets_the_lock_when_its_holder_lets_it_expire(client: AppClient, ask: Ask) -> None:
    held = acquire(client, owner="holder", ttl_seconds=1)
    answer = ask("waiter").result(10)
    assert answer.status == 201
    assert instant(answer.json["acquired_at"]) >= instant(held["expires_at"])


def test_a_waiter_gets_a_lock_that_is_force_released_or_deleted_by_hand(client: AppClient, ask: Ask, sql: Sql) -> None:
    held = acquire(client, owner="holder")
    first = ask("first")
    force(client, held["fencing_token"])
    assert first.result(5).status == 201
    second = ask("second")
    sql("DELETE FROM distributed_locks")
    assert second.result(5).status == 201


def test_waiters_are_granted_a_lock_in_order_of_arrival(client: AppClient, ask: Ask) -> None:
    token = acquire(client, owner="holder")["fencing_token"]
    queue = [(owner, ask(owner)) for owner in ("e", "a", "d", "b", "c")]
    for owner, waiting in queue:
        release(client, token)
        answer = waiting.result(5)
        assert answer.json["owner"] == owner
        assert answer.json["fencing_token"] > token
        token = answer.json["fencing_token"]


def test_a_wait_that_ends_without_the_lock_is_answered_after_wait_seconds(client: AppClient) -> None:
    acquire(client, owner="holder")
    started = time.monotonic()
    answer = client.post(BUILD, {"owner": "waiter", "wait_seconds": 1})
    assert 0.9 < time.monotonic() - started < 3
    problem = assert_problem(answer, 409, "lock-held", waiting=1)
    assert problem["holder"]["owner"] == "holder"
    assert answer.headers["Retry-After"] == "1"


def test_a_free_lock_that_is_promised_to_a_waiter_is_refused_to_others(client: AppClient, sql: Sql) -> None:
    token = acquire(client, owner="holder")["fencing_token"]
    client.post(BUILD, {"owner": "waiter", "wait_seconds": 1})  # it times out, but its place lasts 2 s
    release(client, token)
    answer = client.post(BUILD, {"owner": "newcomer"})
    assert_problem(answer, 409, "lock-held", holder=None, waiting=1)
    assert client.get(BUILD).status == 404
    assert client.post(BUILD, {"owner": "waiter"}).status == 201, "the lock is promised to this owner"


def test_a_place_lasts_two_seconds_after_its_last_request(client: AppClient, sql: Sql) -> None:
    token = acquire(client, owner="holder")["fencing_token"]
    client.post(BUILD, {"owner": "gone", "wait_seconds": 1})
    asked = sql("SELECT asked_at FROM lock_waiters")[0][0]
    release(client, token)
    wait_until(lambda: client.post(BUILD, {"owner": "newcomer"}).status in (200, 201))
    assert timedelta(seconds=2) <= instant(client.get(BUILD).json["acquired_at"]) - asked < timedelta(seconds=3)


def test_a_waiter_that_asks_again_in_time_keeps_its_place_and_a_late_one_goes_to_the_end(
    database: db.Database, sql: Sql
) -> None:
    minute = timedelta(minutes=1)

    def ask(owner: str) -> list[str]:
        with database.connection() as conn:
            assert not locks.acquire(conn, "build", owner, minute, wait=True).granted
        return waiters(sql)

    with database.connection() as conn:
        locks.acquire(conn, "build", "holder", minute)
    for owner in ("late", "prompt", "third"):
        ask(owner)
    wait_until(lambda: ask("prompt") == ["prompt"])  # meanwhile the other places lapse
    ask("late")
    ask("prompt")
    ask("third")
    assert waiters(sql) == ["prompt", "late", "third"]


def test_only_a_request_with_wait_seconds_takes_a_place(client: AppClient, sql: Sql) -> None:
    token = acquire(client, owner="holder")["fencing_token"]
    client.post(BUILD, {"owner": "impatient"})
    client.post(BUILD, {"owner": "explicit", "wait_seconds": 0})
    assert sql("SELECT owner FROM lock_waiters") == []
    release(client, token)
    assert client.post(BUILD, {"owner": "newcomer", "wait_seconds": 5}).status == 201


def test_a_request_that_may_wait_gets_a_free_lock_at_once(client: AppClient) -> None:
    assert client.post(BUILD, {"owner": "a", "wait_seconds": 30}).status == 201
    again = client.post(BUILD, {"owner": "a", "wait_seconds": 30})
    assert again.status == 200, "and its own grant as well"


def test_a_waiter_that_died_is_skipped(client: AppClient, ask: Ask, database: db.Database) -> None:
    """It asked once, through an instance that is gone by now."""
    token = acquire(client, owner="holder")["fencing_token"]
    with database.connection() as conn:
        locks.acquire(conn, "build", "dead", timedelta(minutes=1), wait=True)
    second = ask("second")
    release(client, token)
    assert second.result(10).json["owner"] == "second"


def test_a_waiter_whose_client_disconnected_stops_waiting_and_gets_no_grant(
    app: Flask, client: AppClient, ask: Ask, sql: Sql
) -> None:
    token = acquire(client, owner="holder")["fencing_token"]
    near, far = socket.socketpair()
    with near, far:
        gone = ask("gone", by=AppClient(app, far))
        second = ask("second")
        near.close()
        assert gone.result(5).status == 409, "its thread is free again"
        release(client, token)
        assert second.result(10).json["owner"] == "second"
    assert sql("SELECT 1 FROM grants WHERE owner = 'gone'") == []


def test_all_waiters_of_a_worker_share_one_connection(client: AppClient, ask: Ask, sql: Sql) -> None:
    held = {name: acquire(client, name, owner="holder")["fencing_token"] for name in ("a", "b", "c", "d")}
    waiting = {name: [ask(f"{name} {i}", name) for i in range(3)] for name in held}
    assert len(sql(POLLERS)) == 1
    for i in range(3):
        for name in held:
            release(client, held[name], name)
        for name in held:
            held[name] = waiting[name][i].result(5).json["fencing_token"]
    assert len(sql(POLLERS)) == 1


def test_a_worker_does_not_poll_while_nobody_waits(client: AppClient, ask: Ask, sql: Sql) -> None:
    token = acquire(client, owner="holder")["fencing_token"]
    waiting = ask("waiter")
    busy = sql(POLLERS)
    wait_until(lambda: sql(POLLERS) != busy)
    release(client, token)
    waiting.result(5)
    quiet = sql(POLLERS)
    sql("SELECT pg_sleep(0.5)")  # ten polls
    assert sql(POLLERS) == quiet


def test_a_lock_with_an_open_fenced_transaction_does_not_delay_waiters_for_other_locks(
    client: AppClient, ask: Ask, sql: Sql, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    """A fenced transaction may outlast its grant: only the waiters for that lock have to wait for it."""
    fenced = acquire(client, "a", owner="holder", ttl_seconds=1)["fencing_token"]
    held = acquire(client, "b", owner="holder")["fencing_token"]
    with session() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT loom_fence('a', %s)", (fenced,))
        stuck, free = ask("one", "a"), ask("two", "b")
        wait_expired(sql, "a")
        release(client, held, "b")
        assert free.result(10).status == 201
        assert not stuck.done()
    assert stuck.result(5).status == 201


def test_waiting_requests_leave_threads_for_other_requests(dsn: str, app: Flask, ask: Ask, sql: Sql) -> None:
    """Beyond a number of waiters a request is answered at once, and keeps its place by asking again."""
    config = Config(database=DatabaseConfig(type="postgres", dsn=dsn), server=ServerConfig(threads=4))
    client = AppClient(create_app(config))
    token = acquire(client, owner="holder")["fencing_token"]
    inside = [ask(f"inside {i}", by=client) for i in range(2)]
    started = time.monotonic()
    for _ in range(3):
        assert_problem(client.post(BUILD, {"owner": "outside", "wait_seconds": 20}), 409, "lock-held", waiting=3)
    assert time.monotonic() - started < 10, "one of them waited"
    for waiting in inside:
        release(client, token)
        token = waiting.result(5).json["fencing_token"]
    assert waiters(sql) == ["outside"]
    release(client, token)
    assert client.post(BUILD, {"owner": "outside", "wait_seconds": 20}).status == 201


def test_a_waiter_at_a_draining_instance_is_answered_at_once_and_keeps_its_place(
    client: AppClient, ask: Ask, sql: Sql, instance: Instance
) -> None:
    """So it can ask another instance, and a restart does not wait for it."""
    acquire(client, owner="holder")
    waiting = ask("waiter")
    instance.drain()
    assert_problem(waiting.result(10), 409, "lock-held")
    assert_problem(client.post(BUILD, {"owner": "late", "wait_seconds": 20}), 409, "lock-held")
    assert waiters(sql) == ["waiter", "late"]
