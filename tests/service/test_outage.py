"""An outage of the database costs bounded time, then none, and everything recovers by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from harness import MARGIN, AppClient, Postgres, wait_until
from harness.locks import BUILD, LOCKS, Sql, acquire, assert_problem, release
from psycopg2.extensions import parse_dsn

from loom import db, errors, locks
from loom.db import Database
from loom.instances import Instance

BOUND = 5.0 + MARGIN  # database.timeout


@pytest.fixture
def postgres(own_postgres: Postgres) -> Postgres:
    """A server of the test's own, which it may stop: it replaces the session's server in all fixtures."""
    return own_postgres


def healthy(client: AppClient) -> bool:
    return client.get("/health").status == 200


def assert_away(client: AppClient, instance: Instance) -> None:
    """Check the answers of an instance without a database, and that they come at once."""
    started = time.monotonic()
    answer = client.get("/health")
    health = answer.json
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert list(health)[:4] == ["healthy", "instance_id", "database", "active_instances"]
    assert (health["healthy"], health["database"], health["active_instances"]) == (False, "disconnected", None)
    assert health["instance_id"] == instance.instance_id
    assert health["dependencies"]["database"]["message"]
    assert client.get("/health/ready").status == 503
    assert client.get("/health/live").status == client.get("/api/openapi.yaml").status == 200
    for _ in range(5):
        for answer in (client.post(BUILD), client.put(BUILD, {"fencing_token": 1}), client.get("/api/v1/locks")):
            assert_problem(answer, 503, "unavailable")
            assert answer.headers["Retry-After"] == "1"
    assert client.put(BUILD, {}).status == 400, "a refusal that needs no database is answered as always"
    assert time.monotonic() - started < 4, "one of them waited for the database"


def test_a_stopped_server_is_reported_and_found_again(
    client: AppClient, instance: Instance, postgres: Postgres
) -> None:
    held = acquire(client, owner="a", ttl_seconds=600)
    identity = instance.instance_id
    postgres.stop()
    wait_until(lambda: not healthy(client))
    assert_away(client, instance)
    postgres.start()
    wait_until(lambda: healthy(client), BOUND)
    renewed = client.put(BUILD, {"fencing_token": held["fencing_token"]})
    assert (renewed.status, renewed.json["owner"]) == (200, "a")
    wait_until(lambda: instance.missed == 0 and instance.fresh)
    assert instance.instance_id == identity
    assert client.get("/health").json["active_instances"] == 1


def test_a_silent_server_delays_requests_once_and_within_the_bound(
    client: AppClient, instance: Instance, postgres: Postgres
) -> None:
    acquire(client, owner="a", ttl_seconds=600)
    with postgres.frozen():
        started = time.monotonic()
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda i: client.post(f"{LOCKS}{i}"), range(8)))
        assert time.monotonic() - started < BOUND
        assert {answer.status for answer in answers} == {503}
        assert_away(client, instance)
    wait_until(lambda: healthy(client), BOUND)
    assert client.post(BUILD, {"owner": "a"}).status == 200


def test_a_waiter_is_answered_503_when_the_database_fails(client: AppClient, postgres: Postgres, sql: Sql) -> None:
    acquire(client, owner="holder")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.post, BUILD, {"owner": "waiter", "wait_seconds": 30})
        wait_until(lambda: sql("SELECT 1 FROM lock_waiters"))
        postgres.kill()
        assert_problem(waiting.result(BOUND), 503, "unavailable")


def test_a_hold_is_lost_when_its_ttl_passes_without_an_answer(postgres: Postgres, database: Database) -> None:
    told = threading.Event()
    started = time.monotonic()

    def work() -> None:
        with locks.hold("build", ttl=2, on_lost=told.set), postgres.frozen():
            assert told.wait(10)
            assert time.monotonic() - started < 2 + MARGIN

    with pytest.raises(errors.LockLost):
        work()


def test_a_hold_survives_an_outage_that_is_shorter_than_its_ttl(postgres: Postgres, database: Database) -> None:
    with locks.hold("build", ttl=6) as lock:
        with postgres.frozen():
            time.sleep(2.5)  # beyond the first renewal
        wait_until(lambda: lock._trusted_until > time.clock_gettime(time.CLOCK_BOOTTIME) + 4)
        lock.ensure()


def test_nothing_acknowledged_is_lost_in_a_power_cut(client: AppClient, postgres: Postgres, sql: Sql) -> None:
    until, granted, released = time.monotonic() + 2, [], []

    def work(number: int) -> None:
        i = 0
        while time.monotonic() < until + 1:
            i += 1
            answer = client.post(f"{LOCKS}{number}-{i}", {"owner": "a", "ttl_seconds": 600})
            if answer.status != 201:
                return
            granted.append(answer.json)
            if i % 2 and release(client, answer.json["fencing_token"], f"{number}-{i}").status == 204:
                released.append(answer.json["fencing_token"])

    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work, number) for number in range(4)]
        wait_until(lambda: len(released) > 50)
        postgres.kill()
        for future in working:
            future.result()
    postgres.start()
    rows = dict(
        sql("SELECT fencing_token, 'held' FROM distributed_locks UNION ALL SELECT fencing_token, ended_how FROM grants")
    )
    assert {grant["fencing_token"] for grant in granted} <= set(rows)
    assert {rows[token] for token in released} == {"released"}
    wait_until(lambda: healthy(client), BOUND)
    assert acquire(client, "next")["fencing_token"] > max(rows)


def test_an_instance_that_starts_before_its_database_registers_when_the_database_is_up(
    dsn: str, postgres: Postgres, sql: Sql
) -> None:
    postgres.stop()
    database = Database(dsn)
    database.open()
    me = Instance(database, {"port": 1})
    try:
        started = time.monotonic()
        me.start()
        assert time.monotonic() - started < BOUND
        postgres.start()
        wait_until(lambda: sql("SELECT 1 FROM instances WHERE instance_id = %s", me.instance_id))
    finally:
        me.leave()
        database.close()


@pytest.fixture
def pair(start_postgres: Callable[..., Postgres]) -> tuple[Postgres, Postgres, str]:
    """A primary with a synchronous standby, and the DSN that names both."""
    primary = start_postgres()
    name = primary.database()
    backup = primary.folder / "backup"
    primary.run(
        "pg_basebackup", "--pgdata", str(backup), "--write-recovery-conf", "--checkpoint=fast",
        "--dbname", primary.dsn(application_name="standby"),
    )  # fmt: skip
    standby = start_postgres(copy_of=backup)
    wait_until(lambda: primary.query("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"))
    primary.query("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
    primary.query("SELECT pg_reload_conf()")
    wait_until(lambda: primary.query("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
    dsn = (
        f"host={standby.folder},{primary.folder} port={standby.port},{primary.port} user=loom dbname={name}"
        " target_session_attrs=read-write"
    )
    return primary, standby, dsn


def test_a_failover_loses_no_acknowledged_grant_and_needs_no_operator(pair: tuple[Postgres, Postgres, str]) -> None:
    primary, standby, dsn = pair
    database = Database(dsn)
    database.open()
    db.configure(database)
    try:

        def grant(name: str, owner: str = "a") -> locks.Attempt:
            with database.connection() as conn:
                return locks.acquire(conn, name, owner, timedelta(minutes=10))

        before = [grant(f"lock {i}").grant for i in range(20)]
        primary.kill()
        wait_until(lambda: database.away is not None or not answers(grant))
        standby.query("SELECT pg_promote()")
        standby.query("ALTER SYSTEM RESET synchronous_standby_names")
        standby.query("SELECT pg_reload_conf()")
        wait_until(lambda: answers(grant), 10)
        after = [grant(f"lock {i}", "b") for i in range(20)]
        assert {attempt.outcome for attempt in after} == {"held"}
        assert [attempt.grant for attempt in after] == before
        new = grant("new").grant
        assert new is not None
        assert new.fencing_token > max(one.fencing_token for one in before if one is not None)
    finally:
        db.configure(None)
        database.close()


def answers(grant: Callable[[str], locks.Attempt]) -> bool:
    try:
        return grant("probe") is not None
    except errors.Unavailable:
        return False


def test_a_standby_is_treated_as_an_outage_until_it_is_promoted(pair: tuple[Postgres, Postgres, str]) -> None:
    """It answers SELECT 1: only a refused write shows that it is a standby."""
    _, standby, dsn = pair
    database = Database(standby.dsn(parse_dsn(dsn)["dbname"]))
    database.open()
    wait_until(lambda: database.away is not None)
    assert "read-only" in str(database.away)
    standby.query("SELECT pg_promote()")
    wait_until(lambda: database.away is None)
    database.close()
