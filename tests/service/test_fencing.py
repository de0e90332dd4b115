"""Tokens only grow, whatever is done to the database, and a write commits only under the grant that it names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from harness import Postgres, wait_until
from harness.locks import Sql, wait_expired
from harness.postgres import query

from loom import db, errors, locks
from loom.db.connection import WRONG_SERVER

Session = Callable[[], psycopg2.extensions.connection]
Dial = Callable[[], db.Connection]
Run = Callable[..., "Future[Any]"]

MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
NAME_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('build', 0))"
DRAWN = "SELECT last_value, is_called FROM fencing_tokens"
NOW = "SELECT clock_timestamp()"


@pytest.fixture
def dial(database: db.Database) -> Iterator[Dial]:
    """Opens connections for calls that another session blocks."""
    opened: list[db.Connection] = []

    def connect() -> db.Connection:
        opened.append(database.connect("blocked"))
        opened[-1].deadline += 60
        return opened[-1]

    yield connect
    for conn in opened:
        conn.close()


@pytest.fixture
def blocked(dial: Dial, sql: Sql) -> Iterator[Run]:
    """Starts `function(conn, ...)` on a thread and returns its future once another session blocks it."""
    with ThreadPoolExecutor(4) as threads:

        def run(function: Callable[..., Any], *args: Any) -> Future[Any]:
            conn = dial()
            future = threads.submit(function, conn, *args)
            waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
            wait_until(lambda: future.done() or sql(waits, conn.raw.info.backend_pid)[0][0])
            assert not future.done(), future.result()
            return future

        yield run


def grant(conn: db.Connection, owner: str = "a", ttl: timedelta = MINUTE) -> locks.Grant:
    attempt = locks.acquire(conn, "build", owner, ttl)
    assert attempt.granted
    assert attempt.grant is not None
    return attempt.grant


def first(cursor: psycopg2.extensions.cursor) -> Any:
    row = cursor.fetchone()
    assert row is not None
    return row[0]


def token(dsn: str) -> int:
    """Acquire and release a lock in this database, and return its token."""
    outcome, number, _ = query(
        dsn,
        "SELECT a.outcome, a.fencing_token, release_lock('probe', a.fencing_token, 'released', NULL)"
        "  FROM acquire_lock('probe', 'a', NULL, '30 s', NULL, false) a",
    )[0]
    assert outcome == "new"
    return number


# Tokens only grow


def test_tokens_grow_however_grants_end_and_the_sequence_is_changed(dsn: str, sql: Sql) -> None:
    last = token(dsn)
    for statement in (
        "SELECT 1",
        "DELETE FROM distributed_locks",
        "TRUNCATE distributed_locks",
        "TRUNCATE distributed_locks RESTART IDENTITY CASCADE",
        "TRUNCATE distributed_locks, grants, lock_waiters, instances RESTART IDENTITY CASCADE",
        "ALTER SEQUENCE fencing_tokens RESTART",
        "ALTER SEQUENCE fencing_tokens RESTART WITH 1",
        "SELECT raise_fencing_tokens()",
        "DROP SEQUENCE fencing_tokens; CREATE SEQUENCE fencing_tokens",
    ):
        sql("SELECT acquire_lock('held', 'a', NULL, '30 s', NULL, false)")
        last = max(last, sql("SELECT max(fencing_token) FROM distributed_locks")[0][0])
        sql(statement)
        assert token(dsn) > last, statement
        last = token(dsn)
    assert last < 2**53, "JSON readers keep it exact"


def test_tokens_grow_across_a_restart_and_a_power_cut_of_the_server(own_postgres: Postgres) -> None:
    dsn = own_postgres.dsn(own_postgres.database())
    last = token(dsn)
    for end in (own_postgres.stop, own_postgres.kill):
        end()
        own_postgres.start()
        following = token(dsn)
        assert last < following < last + 2**32, "a restart is no new timeline"
        last = following


def test_tokens_grow_across_dump_and_restore(postgres: Postgres, dsn: str) -> None:
    file = str(postgres.folder / "dump")
    token(dsn)
    postgres.run("pg_dump", "--format=custom", f"--file={file}", "--dbname", dsn)
    last = max(token(dsn) for _ in range(10))
    restored = postgres.empty_database()
    postgres.run("pg_restore", "--dbname", postgres.dsn(restored), file)
    assert token(postgres.dsn(restored)) > last
    postgres.drop(restored)


@pytest.mark.parametrize("granted", [0, 1])
def test_tokens_grow_across_a_copy_of_the_database(postgres: Postgres, granted: int) -> None:
    original = postgres.empty_database()
    db.migrate(postgres.dsn(original))
    for _ in range(granted):
        token(postgres.dsn(original))
    copy = postgres.empty_database(original)
    last = max(token(postgres.dsn(original)) for _ in range(10))
    assert token(postgres.dsn(copy)) > last
    postgres.drop(copy)
    postgres.drop(original)


def test_tokens_grow_across_an_asynchronous_failover(start_postgres: Callable[..., Postgres]) -> None:
    primary = start_postgres()
    name = primary.database()
    token(primary.dsn(name))
    backup = primary.folder / "backup"
    primary.run("pg_basebackup", "--pgdata", str(backup), "--checkpoint=fast", "--dbname", primary.dsn())
    (backup / "standby.signal").touch()
    last = max(token(primary.dsn(name)) for _ in range(50))  # these grants never reach the standby
    standby = start_postgres(copy_of=backup)
    with pytest.raises(psycopg2.Error) as refused:
        token(standby.dsn(name))
    assert refused.value.pgcode in WRONG_SERVER
    assert standby.query("SELECT pg_promote()") == [(True,)]
    assert token(standby.dsn(name)) > last


def test_tokens_grow_across_two_copies_of_the_same_database(postgres: Postgres) -> None:
    """A failover, and then a return to last night's backup: neither copy knows the tokens of the other."""
    original = postgres.database()
    first, second = postgres.empty_database(original), postgres.empty_database(original)
    last = max(token(postgres.dsn(first)) for _ in range(100))
    assert token(postgres.dsn(second)) > last
    for name in (original, first, second):
        postgres.drop(name)


def test_tokens_grow_across_a_recovery_to_a_point_in_time(
    start_postgres: Callable[..., Postgres],
) -> None:
    whole = "cp %p ../archive/new && mv ../archive/new ../archive/%f"  # so that a file that exists is complete
    primary = start_postgres(settings={"archive_mode": "on", "archive_command": whole})
    archive = primary.folder / "archive"
    archive.mkdir()
    name = primary.database()
    backup = primary.folder / "backup"
    primary.run("pg_basebackup", "--pgdata", str(backup), "--checkpoint=fast", "--dbname", primary.dsn())
    token(primary.dsn(name))
    primary.query("SELECT pg_create_restore_point('then')")
    last = max(token(primary.dsn(name)) for _ in range(50))
    (segment,) = primary.query("SELECT pg_walfile_name(pg_switch_wal())")[0]
    wait_until(lambda: (archive / segment).exists())
    (backup / "recovery.signal").touch()
    recovered = start_postgres(
        copy_of=backup,
        settings={
            "restore_command": f"cp {archive}/%f %p",
            "recovery_target_name": "then",
            "recovery_target_action": "promote",
        },
    )
    wait_until(lambda: recovered.query("SELECT NOT pg_is_in_recovery()")[0][0])
    assert token(recovered.dsn(name)) > last


# A token is drawn, and the clock is read, only under the lock of the name


def test_no_older_token_is_granted_after_a_newer_one(
    database: db.Database, session: Session, blocked: Run, sql: Sql
) -> None:
    """A caller that waits for the name has not drawn its token yet."""
    with database.connection() as conn:
        grant(conn, "before", timedelta(milliseconds=1))
    with session() as holder, holder.cursor() as cursor:
        cursor.execute(NAME_LOCK)
        drawn = sql(DRAWN)
        late = blocked(grant, "late")
        assert sql(DRAWN) == drawn
        with database.connection() as conn:
            between = locks.acquire(conn, "another", "a", MINUTE).grant
    assert between is not None
    assert late.result().fencing_token > between.fencing_token


def test_a_transaction_paused_between_drawing_its_token_and_granting_blocks_other_grants(
    session: Session, blocked: Run, sql: Sql
) -> None:
    with session() as holder, holder.cursor() as cursor:
        cursor.execute(  # not committed: an insert of this name waits for this transaction
            "INSERT INTO distributed_locks VALUES ('build', NULL, 'x', 1, now(), now(), now())"
        )
        drawn = sql(DRAWN)
        paused = blocked(grant, "paused")
        assert sql(DRAWN) != drawn
        drawn = sql(DRAWN)
        second = blocked(locks.acquire, "build", "second", MINUTE)
        assert sql(DRAWN) == drawn, "otherwise a newer token could be granted before the older one"
        holder.rollback()
    assert paused.result().owner == "paused"
    attempt = second.result()
    assert (attempt.outcome, attempt.grant) == ("held", paused.result())


def test_a_grant_that_waited_for_the_previous_one_begins_after_its_end(session: Session, blocked: Run) -> None:
    with session() as holder, holder.cursor() as cursor:
        cursor.execute("SELECT fencing_token FROM acquire_lock('build', 'a', NULL, '30 s', NULL, false)")
        number = first(cursor)
        following = blocked(grant, "b")
        cursor.execute("SELECT release_lock('build', %s, 'released', NULL)", (number,))
        cursor.execute("SELECT ended_at FROM grants")
        ended = first(cursor)
    assert following.result().acquired_at >= ended


@pytest.mark.parametrize("call", ["renew", "release"])
@pytest.mark.parametrize("way", ["name", "row"])
def test_a_grant_that_expired_while_its_holders_request_was_blocked_is_lost(
    database: db.Database, session: Session, blocked: Run, sql: Sql, way: str, call: str
) -> None:
    with database.connection() as conn:
        mine = grant(conn, ttl=SECOND)
    with session() as holder, holder.cursor() as cursor:
        cursor.execute(NAME_LOCK if way == "name" else "SELECT FROM distributed_locks FOR UPDATE")
        if call == "renew":
            late = blocked(locks.renew, "build", mine.fencing_token, MINUTE)
        else:
            late = blocked(locks.release, "build", mine.fencing_token)
        wait_expired(sql)
    with pytest.raises(errors.LockLost) as lost:
        late.result()
    assert lost.value.members["ended_how"] == "expired"
    assert sql("SELECT 1 FROM distributed_locks WHERE expires_at > clock_timestamp()") == []


def test_a_blocked_renewal_does_not_revive_a_forced_grant(
    database: db.Database, session: Session, blocked: Run, sql: Sql
) -> None:
    with database.connection() as conn:
        mine = grant(conn)
    with session() as holder, holder.cursor() as cursor:
        cursor.execute("DELETE FROM distributed_locks WHERE lock_name = 'build'")
        late = blocked(locks.renew, "build", mine.fencing_token, MINUTE)
    with pytest.raises(errors.LockLost) as lost:
        late.result()
    assert lost.value.members["ended_how"] == "forced"
    assert sql("SELECT 1 FROM distributed_locks") == []


# A write under a token


@pytest.fixture
def work(sql: Sql) -> None:
    """A table of the user's own, beside Loom's."""
    sql("CREATE TABLE work (written_by bigint, at timestamptz DEFAULT clock_timestamp())")


def write(conn: db.Connection, number: int) -> None:
    db.run(conn, "INSERT INTO work VALUES (%(number)s)", number=number)


@pytest.mark.usefixtures("work")
def test_a_write_under_a_held_grant_commits(database: db.Database, sql: Sql) -> None:
    with database.transaction() as conn:
        mine = grant(conn)
    with database.transaction() as conn:
        locks.check(conn, "build", mine.fencing_token)
        write(conn, mine.fencing_token)
        locks.check(conn, "build", mine.fencing_token)
    assert sql("SELECT written_by FROM work") == [(mine.fencing_token,)]


def end_by_expiry(sql: Sql, number: int) -> None:
    sql("UPDATE distributed_locks SET expires_at = clock_timestamp()")


def end_by_hand(sql: Sql, number: int) -> None:
    sql("DELETE FROM distributed_locks")


def end_and_pass_on(sql: Sql, number: int) -> None:
    sql("SELECT release_lock('build', %s, 'forced', NULL)", number)
    sql("SELECT acquire_lock('build', 'b', NULL, '30 s', NULL, false)")


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("end", [end_by_expiry, end_by_hand, end_and_pass_on])
@pytest.mark.parametrize("write_first", [False, True])
def test_a_write_under_a_lost_grant_is_rolled_back(
    database: db.Database, sql: Sql, end: Callable[[Sql, int], None], write_first: bool
) -> None:
    with database.connection() as conn:
        mine = grant(conn)
    end(sql, mine.fencing_token)

    def fenced_write() -> None:
        with database.transaction() as conn:
            if write_first:
                write(conn, mine.fencing_token)
            locks.check(conn, "build", mine.fencing_token)
            write(conn, mine.fencing_token)

    with pytest.raises(errors.LockLost):
        fenced_write()
    assert sql("SELECT 1 FROM work") == []


def test_a_token_fences_only_its_own_lock(database: db.Database, dsn: str) -> None:
    with database.connection() as conn:
        mine = grant(conn)
    for name, number in (("other", mine.fencing_token), ("build", mine.fencing_token - 1), ("build", 2**53 - 1)):
        with pytest.raises(psycopg2.DatabaseError) as refused:
            query(dsn, "SELECT loom_fence(%s, %s)", name, number)
        assert refused.value.pgcode == "L0001"
    query(dsn, "SELECT loom_fence('build', %s)", mine.fencing_token)


@pytest.mark.parametrize("end", ["DELETE FROM distributed_locks", "UPDATE distributed_locks SET expires_at = now()"])
def test_an_older_snapshot_does_not_hide_the_end_of_a_grant(
    database: db.Database, session: Session, sql: Sql, end: str
) -> None:
    with database.connection() as conn:
        mine = grant(conn)
    writer = session()
    writer.set_session(isolation_level="REPEATABLE READ")
    with writer.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM distributed_locks")  # takes the snapshot
        sql(end)
        with pytest.raises(psycopg2.Error) as refused:
            cursor.execute("SELECT loom_fence('build', %s)", (mine.fencing_token,))
    assert refused.value.pgcode in ("L0001", "40001")


def force(conn: db.Connection, number: int) -> None:
    locks.force_release(conn, "build", number)


def release(conn: db.Connection, number: int) -> None:
    locks.release(conn, "build", number)


def delete(conn: db.Connection, number: int) -> None:
    db.run(conn, "DELETE FROM distributed_locks")


def truncate(conn: db.Connection, number: int) -> None:
    db.run(conn, "TRUNCATE distributed_locks")


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("end", [delete, truncate])
def test_a_grant_does_not_end_before_the_write_that_it_fences_commits(
    database: db.Database, session: Session, blocked: Run, sql: Sql, end: Callable[..., Any]
) -> None:
    with database.connection() as conn:
        mine = grant(conn)
    with session() as writer, writer.cursor() as cursor:
        cursor.execute("SELECT loom_fence('build', %s)", (mine.fencing_token,))
        ending = blocked(end, mine.fencing_token)
        cursor.execute("INSERT INTO work VALUES (%s) RETURNING at", (mine.fencing_token,))
        written: datetime = first(cursor)
    ending.result()
    assert sql("SELECT ended_at FROM grants")[0][0] > written


@pytest.mark.parametrize("end", [force, release])
def test_a_release_is_refused_while_a_transaction_that_the_grant_fences_is_running(
    database: db.Database, session: Session, sql: Sql, end: Callable[..., Any]
) -> None:
    """It does not wait, since it has locked the name of the lock, which others ask for."""
    with database.connection() as conn:
        mine = grant(conn)
    with session() as writer, writer.cursor() as cursor:
        cursor.execute("SELECT loom_fence('build', %s)", (mine.fencing_token,))
        started = time.monotonic()
        with pytest.raises(errors.Busy, match=f"session {writer.info.backend_pid}"), database.connection() as conn:
            end(conn, mine.fencing_token)
        assert time.monotonic() - started < 0.5
        assert sql("SELECT owner FROM distributed_locks") == [(mine.owner,)]
    with database.connection() as conn:
        end(conn, mine.fencing_token)
    assert sql("SELECT count(*) FROM grants") == [(1,)]


@pytest.mark.usefixtures("work")
def test_an_expired_lock_is_not_taken_before_the_write_that_it_fences_commits(
    database: db.Database, session: Session, sql: Sql
) -> None:
    """Otherwise the next holder's write could commit first. A request is refused at once and draws no token."""
    with database.connection() as conn:
        mine = grant(conn, ttl=SECOND)
        with session() as writer, writer.cursor() as cursor:
            cursor.execute("SELECT loom_fence('build', %s)", (mine.fencing_token,))
            wait_expired(sql)
            drawn = sql(DRAWN)
            refused = locks.acquire(conn, "build", "next", MINUTE)
            assert (refused.outcome, refused.grant, sql(DRAWN)) == ("held", mine, drawn)
            cursor.execute("INSERT INTO work VALUES (%s) RETURNING at", (mine.fencing_token,))
            written: datetime = first(cursor)
        assert grant(conn, "next").acquired_at > written
    assert sql("SELECT ended_how, ended_at FROM grants") == [("expired", mine.expires_at)]


def test_a_holder_can_extend_its_lock_during_its_own_fenced_transaction(
    database: db.Database, session: Session
) -> None:
    """Also by acquiring again: that request, and all later ones for the name, once waited for the transaction."""
    with database.connection() as conn:
        mine = grant(conn)
        with session() as writer, writer.cursor() as cursor:
            cursor.execute("SELECT loom_fence('build', %s)", (mine.fencing_token,))
            again = locks.acquire(conn, "build", "a", 2 * MINUTE)
            assert (again.outcome, again.grant and again.grant.fencing_token) == ("same", mine.fencing_token)
            renewed = locks.renew(conn, "build", mine.fencing_token, 3 * MINUTE)
            assert renewed.expires_at > again.grant.expires_at > mine.expires_at  # type: ignore[union-attr]


def test_another_owner_is_refused_at_once_during_a_fenced_transaction(database: db.Database, session: Session) -> None:
    with database.connection() as conn:
        mine = grant(conn)
    with session() as writer, writer.cursor() as cursor:
        cursor.execute("SELECT loom_fence('build', %s)", (mine.fencing_token,))
        started = time.monotonic()
        with database.connection() as conn:
            attempt = locks.acquire(conn, "build", "b", MINUTE, wait=True)
        assert time.monotonic() - started < 4  # it would wait for 5 s
    assert (attempt.outcome, attempt.grant, attempt.waiting) == ("held", mine, 1)


@pytest.mark.usefixtures("work")
def test_two_fenced_transactions_of_a_holder_do_not_wait_for_each_other(
    database: db.Database, session: Session, sql: Sql
) -> None:
    with database.connection() as conn:
        mine = grant(conn)
    with session() as writer, writer.cursor() as cursor:
        cursor.execute("SELECT loom_fence('build', %s)", (mine.fencing_token,))
        with database.transaction() as conn:
            locks.check(conn, "build", mine.fencing_token)
            write(conn, 2)
        cursor.execute("INSERT INTO work VALUES (1)")
    assert sql("SELECT written_by FROM work ORDER BY at") == [(2,), (1,)]
