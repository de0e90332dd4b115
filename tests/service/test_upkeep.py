"""What is over disappears by itself, and what is not stays."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.locks import Sql, acquire, wait_expired

from loom import db, locks, upkeep
from loom.config import Config
from loom.instances import Instance
from loom.upkeep import Upkeep

MINUTE = timedelta(minutes=1)


@pytest.fixture
def cleaner(instance: Instance) -> Upkeep:
    """One that cleans when told to."""
    return Upkeep(Config(), instance)


@pytest.fixture
def elected(database: db.Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Upkeep]]:
    """Starts candidates, each of an instance of its own, with rounds of 0.2 s instead of 10."""
    monkeypatch.setattr(upkeep, "PERIOD", 0.2)
    started: list[tuple[Upkeep, Instance]] = []

    def start() -> Upkeep:
        me = Instance(database, {})
        me.beat()
        started.append((Upkeep(Config(), me), me))
        started[-1][0].start()
        return started[-1][0]

    yield start
    for candidate, me in started:
        candidate.stop()
        me.leave()


def leader(sql: Sql) -> str:
    found = sql("SELECT owner FROM distributed_locks WHERE lock_name = %s AND expires_at > now()", upkeep.LOCK)
    return found[0][0] if found else ""


def many_expired(sql: Sql, count: int) -> None:
    sql(
        "INSERT INTO distributed_locks SELECT 'many ' || i, NULL, 'a', nextval('fencing_tokens'), now(), now(), now()"
        "  FROM generate_series(1, %s) AS i",
        count,
    )


def test_expired_locks_disappear_into_the_history(client: AppClient, sql: Sql, cleaner: Upkeep) -> None:
    acquire(client, "old", owner="a", ttl_seconds=1)
    acquire(client, "held", owner="a")
    wait_expired(sql, "old")
    many_expired(sql, 2500)  # more than two batches
    cleaner.clean()
    assert sql("SELECT lock_name FROM distributed_locks") == [("held",)]
    assert sql("SELECT ended_how, count(*) FROM grants WHERE ended_at = expires_at GROUP BY 1") == [("expired", 2501)]


def test_a_row_that_somebody_is_at_holds_up_nobody(
    sql: Sql, cleaner: Upkeep, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    many_expired(sql, 10)
    with session() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT FROM distributed_locks WHERE lock_name = 'many 3' FOR UPDATE")
        cleaner.clean()
        assert sql("SELECT lock_name FROM distributed_locks") == [("many 3",)]


LOCKED = {
    "distributed_locks": ("locks", "UPDATE distributed_locks SET expires_at = now() - INTERVAL '2 minutes'", "old"),
    "idempotency_keys": (
        "idempotency keys",
        "INSERT INTO idempotency_keys SELECT ('00000000-0000-0000-0000-00000000000' || n)::uuid, 'k', 'POST', '/', '',"
        " '', 200, '{}', '', now() - INTERVAL '2 days' FROM generate_series(1, 2) AS n",
        "00000000-0000-0000-0000-000000000001",
    ),
    "grants": (
        "history of grants",
        "DELETE FROM distributed_locks; UPDATE grants SET ended_at = '2000-01-01',"
        " fencing_token = fencing_token - (SELECT min(fencing_token) FROM grants) + 1",
        "1",
    ),
}


@pytest.mark.parametrize("table", LOCKED)
def test_a_row_that_stays_locked_is_named_in_the_log_and_no_other_waits_for_it(
    client: AppClient,
    sql: Sql,
    cleaner: Upkeep,
    session: Callable[[], psycopg2.extensions.connection],
    caplog: pytest.LogCaptureFixture,
    table: str,
) -> None:
    part, make_old, key = LOCKED[table]
    for name in ("old", "older"):
        acquire(client, name)
    sql(make_old)
    (ctid,) = sql(f"SELECT min(ctid::text) FROM {table}")[0]
    with session() as conn, conn.cursor() as cursor:
        cursor.execute(f"SELECT FROM {table} WHERE ctid = %s::tid FOR UPDATE", (ctid,))
        for _ in range(2):
            cleaner.clean()
        assert sql(f"SELECT ctid::text FROM {table}") == [(ctid,)]
    skipped = [record.fields for record in caplog.records if record.msg == "upkeep-skipped"]
    assert skipped == [{"part": part, "rows": {key: "its row is locked"}}]
    cleaner.clean()
    assert sql(f"SELECT ctid::text FROM {table} WHERE ctid = %s::tid", ctid) == []


@pytest.mark.usefixtures("server_age")
@pytest.mark.parametrize("locked", ["instances", "distributed_locks"])
def test_a_dead_instance_whose_row_or_grant_is_locked_keeps_no_other_alive(
    database: db.Database,
    sql: Sql,
    cleaner: Upkeep,
    session: Callable[[], psycopg2.extensions.connection],
    locked: str,
) -> None:
    first, second = (register(sql, timedelta(seconds=61)) for _ in range(2))
    with database.connection() as conn:
        for one in (first, second):
            locks.acquire(conn, one, f"instance:{one}", MINUTE, instance_id=one)
    with session() as holder, holder.cursor() as cursor:
        cursor.execute(f"SELECT FROM {locked} WHERE instance_id = %s FOR UPDATE", (first,))
        cleaner.clean()
        status = "SELECT status FROM instances WHERE instance_id = %s"
        assert (sql(status, first), sql(status, second)) == ([("active",)], [("dead",)])
    cleaner.clean()
    assert sql(status, first) == [("dead",)]
    assert sql("SELECT lock_name FROM distributed_locks") == []


@pytest.mark.usefixtures("server_age")
def test_a_dead_instance_does_not_wait_for_a_write_that_its_grant_fences(
    database: db.Database, sql: Sql, cleaner: Upkeep, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    one = register(sql, timedelta(seconds=61))
    with database.connection() as conn:
        got = locks.acquire(conn, "mine", f"instance:{one}", MINUTE, instance_id=one).grant
        assert got is not None
        with session() as writer, writer.cursor() as cursor:
            cursor.execute("SELECT loom_fence('mine', %s)", (got.fencing_token,))
            cleaner.clean()
            assert sql("SELECT status FROM instances WHERE instance_id = %s", one) == [("dead",)]
            assert not locks.acquire(conn, "mine", "next", MINUTE).granted
        assert locks.acquire(conn, "mine", "next", MINUTE).granted


def test_a_row_that_fails_is_named_in_the_log_and_the_others_go(
    client: AppClient, sql: Sql, cleaner: Upkeep, caplog: pytest.LogCaptureFixture
) -> None:
    many_expired(sql, 10)
    sql("UPDATE distributed_locks SET expires_at = expires_at - INTERVAL '2 minutes'")
    columns = "lock_name, instance_id, owner, fencing_token, acquired_at, expires_at, heartbeat_at, metadata"
    held = f"SELECT {columns}, now(), 'expired' FROM distributed_locks WHERE lock_name = 'many 3'"
    sql(f"INSERT INTO grants ({columns}, ended_at, ended_how) {held}")
    cleaner.clean()
    assert sql("SELECT lock_name FROM distributed_locks") == [("many 3",)]
    (skipped,) = (record.fields for record in caplog.records if record.msg == "upkeep-skipped")
    assert "grants_pkey" in skipped["rows"]["many 3"]


@pytest.mark.parametrize("table", ["distributed_locks", "lock_waiters", "instances", "agents", "beads", "events"])
def test_a_part_whose_table_is_locked_holds_up_no_other(
    sql: Sql,
    cleaner: Upkeep,
    instance: Instance,
    session: Callable[[], psycopg2.extensions.connection],
    table: str,
) -> None:
    sql("INSERT INTO idempotency_keys VALUES (md5('')::uuid, '', '', '', '', '', 200, '{}', '', '2000-01-01')")
    with session() as conn, conn.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {table}")
        started = time.monotonic()
        cleaner.clean()
        assert time.monotonic() - started < 3
        assert sql("SELECT 1 FROM idempotency_keys") == []


def test_places_of_waiters_that_are_gone_disappear(database: db.Database, sql: Sql, cleaner: Upkeep) -> None:
    with database.connection() as conn:
        for owner in ("holder", "gone", "here"):
            locks.acquire(conn, "build", owner, MINUTE, wait=True)
    sql("UPDATE lock_waiters SET asked_at = asked_at - INTERVAL '61 seconds' WHERE owner = 'gone'")
    cleaner.clean()
    assert sql("SELECT owner FROM lock_waiters") == [("here",)]


def test_old_history_goes_and_the_rest_stays(sql: Sql, instance: Instance) -> None:
    many_expired(sql, 4)
    sql("DELETE FROM distributed_locks")
    for name, days in (("many 1", 6.9), ("many 2", 7.1), ("many 3", 30)):
        sql("UPDATE grants SET ended_at = now() - %s WHERE lock_name = %s", timedelta(days=days), name)
    Upkeep(Config(), instance).clean()
    assert sql("SELECT lock_name FROM grants ORDER BY 1") == [("many 1",), ("many 4",)]


def register(sql: Sql, silent: timedelta) -> str:
    number = str(uuid.uuid4())
    sql("SELECT register_instance(%s, 'elsewhere', '{}')", number)
    sql("UPDATE instances SET last_heartbeat = clock_timestamp() - %s WHERE instance_id = %s", silent, number)
    return number


@pytest.mark.usefixtures("server_age")
def test_who_is_silent_for_a_minute_is_marked_and_for_five_removed(
    database: db.Database, sql: Sql, instance: Instance, cleaner: Upkeep
) -> None:
    silent, long_gone = register(sql, timedelta(seconds=61)), register(sql, timedelta(seconds=301))
    alive = register(sql, timedelta(seconds=50))
    with database.connection() as conn:
        for one in (silent, long_gone, alive):
            locks.acquire(conn, one, f"instance:{one}", MINUTE, instance_id=one)
    cleaner.clean()
    statuses = sorted(sql("SELECT instance_id::text, status FROM instances"))
    assert statuses == sorted([(silent, "dead"), (alive, "active"), (instance.instance_id, "active")])
    assert sql("SELECT lock_name FROM distributed_locks") == [(alive,)]
    assert sql("SELECT DISTINCT ended_how FROM grants") == [("owner-died",)]


@pytest.mark.usefixtures("server_age")
def test_an_instance_never_removes_itself(sql: Sql, instance: Instance, cleaner: Upkeep) -> None:
    register(sql, timedelta(seconds=1))  # so that this is no outage
    sql("UPDATE instances SET last_heartbeat = last_heartbeat - INTERVAL '1 hour' WHERE instance_id = %s",
        instance.instance_id)  # fmt: skip
    cleaner.clean()
    assert sql("SELECT status FROM instances WHERE instance_id = %s", instance.instance_id) == [("active",)]


@pytest.mark.usefixtures("server_age")
def test_nobody_is_marked_or_removed_in_the_first_minute_after_an_outage(
    sql: Sql, instance: Instance, cleaner: Upkeep
) -> None:
    for silent in (90, 600):
        register(sql, timedelta(seconds=silent))
    sql("UPDATE cluster SET outage_ended_at = clock_timestamp() - INTERVAL '50 seconds'")
    cleaner.clean()
    assert sql("SELECT status, count(*) FROM instances GROUP BY 1") == [("active", 3)]


def test_a_part_that_fails_leaves_the_others_alone(sql: Sql, cleaner: Upkeep) -> None:
    many_expired(sql, 3)
    sql("ALTER TABLE lock_waiters RENAME COLUMN asked_at TO renamed")
    sql("INSERT INTO grants SELECT lock_name, NULL, 'a', -fencing_token, now(), now(), now(), '{}',"
        " now() - INTERVAL '1 year', 'expired' FROM distributed_locks")  # fmt: skip
    cleaner.clean()
    assert sql("SELECT 1 FROM distributed_locks UNION ALL SELECT 1 FROM grants WHERE fencing_token < 0") == []


def test_one_at_a_time_cleans_and_another_takes_over(sql: Sql, elected: Callable[[], Upkeep]) -> None:
    candidates = [elected() for _ in range(3)]
    first = wait_until(lambda: leader(sql))
    many_expired(sql, 5)
    wait_until(lambda: sql("SELECT count(*) FROM distributed_locks") == [(1,)])
    assert sql("SELECT count(DISTINCT owner) FROM grants WHERE lock_name = %s", upkeep.LOCK)[0][0] == 0
    for candidate in candidates:
        if f"instance:{candidate._instance.instance_id}" == first:
            candidate.stop()
    second = wait_until(lambda: leader(sql))
    assert second != first
    assert sql("SELECT owner, ended_how FROM grants WHERE lock_name = %s", upkeep.LOCK) == [(first, "released")]


def test_who_was_declared_dead_cleans_no_longer(sql: Sql, elected: Callable[[], Upkeep]) -> None:
    one = elected()
    first = wait_until(lambda: leader(sql))
    sql("UPDATE instances SET status = 'dead'")
    assert leader(sql) == ""
    one._instance.beat()
    second = wait_until(lambda: leader(sql), 30)
    assert second == f"instance:{one._instance.instance_id}" != first
