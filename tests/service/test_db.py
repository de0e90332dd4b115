"""Every wait has a bound, broken connections are replaced, and a busy database is not taken for an outage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta, timezone
from typing import Any

import psycopg2
import pytest
from harness import MARGIN, AppClient, Postgres, wait_until
from harness.locks import BUILD, LOCKS, Sql, acquire, assert_problem
from psycopg2.extensions import make_dsn

from loom import db, errors, locks
from loom.db import Database

Pool = Callable[..., Database]

BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = %s"
)


@pytest.fixture
def pool(dsn: str) -> Iterator[Pool]:
    """Opens pools on the test's database."""
    opened: list[Database] = []

    def start(**options: Any) -> Database:
        opened.append(Database(options.pop("dsn", dsn), **options))
        opened[-1].open()
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def ask(database: Database, sql: str = "SELECT 1 AS one", **params: Any) -> Any:
    with database.connection() as conn:
        row = db.one(conn, sql, **params)
        return row and next(iter(row.values()))


def away(database: Database) -> bool:
    return database.away is not None


def test_a_database_out_of_a_resource_is_not_said_to_be_away(
    pool: Pool, start_postgres: Callable[..., Postgres]
) -> None:
    database = pool(dsn=start_postgres(settings={"max_locks_per_transaction": "10"}).dsn())
    with pytest.raises(errors.Exhausted) as refused:
        ask(database, "SELECT count(pg_advisory_xact_lock(n)) FROM generate_series(1, 50000) AS n")
    assert "cannot be reached" not in str(refused.value)
    assert (refused.value.status, refused.value.type, refused.value.retry_after) == (503, "busy", 1)
    assert not away(database)
    assert ask(database) == 1


# Broken connections are replaced


def test_idle_connections_that_died_are_replaced_without_an_error(client: AppClient, sql: Sql) -> None:
    acquire(client)
    wait_until(lambda: sql(BACKENDS, "loom") >= [(2,)])
    sql("SELECT pg_sleep(1.1)")  # for a second after its use a connection is not checked
    sql(TERMINATE, "loom")
    wait_until(lambda: sql(BACKENDS, "loom") == [(0,)])
    assert client.get(BUILD).status == 200
    assert client.post(LOCKS + "other").status == 201


def test_a_connection_that_dies_during_a_statement_fails_only_that_statement(pool: Pool, sql: Sql) -> None:
    database = pool(application_name="cut")
    with pytest.raises(errors.Unavailable):
        ask(database, "SELECT pg_terminate_backend(pg_backend_pid())")
    assert not away(database)
    assert ask(database) == 1
    assert database.usage()["open"] <= 2


def test_a_lost_connection_of_a_background_thread_is_replaced(database: Database, sql: Sql) -> None:
    connection = database.dedicated("background")
    for idle in (1.1, 0):  # seconds; an idle connection is used for one second without a check
        with connection.use() as conn:
            assert db.one(conn, "SELECT 1 AS one") == {"one": 1}
        sql("SELECT pg_sleep(%s)", idle)
        sql(TERMINATE, "loom background")
        wait_until(lambda: sql(BACKENDS, "loom background") == [(0,)])
    with pytest.raises(errors.Unavailable), connection.use() as conn:
        db.one(conn, "SELECT 1 AS one")
    with connection.use() as conn:
        assert db.one(conn, "SELECT 1 AS one") == {"one": 1}
    connection.close()


# Every wait has a bound


def test_a_slow_statement_is_ended_within_the_bound_also_on_the_server(pool: Pool, sql: Sql) -> None:
    database = pool(timeout=1.5, application_name="slow")
    started = time.monotonic()
    with pytest.raises(errors.Busy):
        ask(database, "SELECT pg_sleep(60)")
    assert time.monotonic() - started < 1.5 + MARGIN
    wait_until(lambda: sql(BACKENDS + " AND state = 'active'", "slow") == [(0,)])
    assert not away(database)
    assert ask(database) == 1


def test_the_statements_of_one_request_share_one_bound(pool: Pool) -> None:
    database = pool(timeout=1.5)
    database.start_request()
    started = time.monotonic()
    with pytest.raises(errors.Busy):  # noqa: PT012
        for _ in range(10):
            ask(database, "SELECT pg_sleep(0.4)")
    assert time.monotonic() - started < 1.5 + MARGIN


def test_a_wait_for_a_row_lock_is_bounded(client: AppClient, session: Callable[[], Any]) -> None:
    acquire(client)
    with session() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT FROM distributed_locks FOR UPDATE")
        started = time.monotonic()
        answer = client.put(BUILD, {"fencing_token": 1})
        assert time.monotonic() - started < 5 + MARGIN
    assert_problem(answer, 503, "busy")
    assert answer.headers["Retry-After"] == "1"
    assert client.get(BUILD).status == 200


def test_an_exhausted_pool_is_a_bounded_wait_and_not_an_outage(pool: Pool) -> None:
    database = pool(pool_min=1, pool_max=2, timeout=1.0)
    with database.connection(), database.connection():
        started = time.monotonic()
        with pytest.raises(errors.Busy):
            ask(database)
        assert 0.5 < time.monotonic() - started < 1.0 + MARGIN
        assert not away(database)
        assert database.usage() == {"open": 2, "idle": 0, "waiting": 0, "max": 2}
    assert ask(database) == 1


def test_threads_that_wait_for_a_connection_get_the_next_returned_one(pool: Pool) -> None:
    database = pool(pool_min=1, pool_max=1)
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(database))) for _ in range(5)]
    with database.connection():
        for thread in threads:
            thread.start()
        wait_until(lambda: database.usage()["waiting"] == 5)
    started = time.monotonic()
    for thread in threads:
        thread.join()
    assert answers == [1] * 5
    assert time.monotonic() - started < 4


def test_the_pool_never_opens_more_than_its_maximum(pool: Pool, sql: Sql) -> None:
    database = pool(pool_min=1, pool_max=3, application_name="bounded")
    threads = [threading.Thread(target=ask, args=(database, "SELECT pg_sleep(0.1)")) for _ in range(12)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, sql(BACKENDS, "bounded")[0][0])
    assert most == 3


def test_too_many_clients_is_not_an_outage(pool: Pool, dsn: str, sql: Sql) -> None:
    """Open connections go on working; one that cannot be opened is reported as busy."""
    (name,) = sql("SELECT current_database()")[0]
    sql(f"CREATE ROLE user_{name} LOGIN")
    database = pool(dsn=make_dsn(dsn, user=f"user_{name}"), pool_min=1, pool_max=5, timeout=1.5)
    assert ask(database) == 1
    sql(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    with database.connection():
        with pytest.raises(errors.Busy):
            ask(database)
        assert not away(database)
    assert ask(database) == 1
    sql(f"DROP ROLE user_{name}")


STUCK = {
    "row": ("SELECT FROM projects FOR UPDATE", "UPDATE projects SET name = 'x'"),
    "table": ("LOCK TABLE beads", "SELECT count(*) FROM beads"),
    "name": (
        "SELECT pg_advisory_xact_lock(hashtextextended('build', 0))",
        "SELECT * FROM acquire_lock('build', 'a', NULL, '1 s', NULL, false)",
    ),
}


@pytest.mark.parametrize("what", STUCK)
def test_what_somebody_keeps_locked_holds_up_only_those_who_ask_for_it(
    pool: Pool, sql: Sql, session: Callable[[], Any], what: str
) -> None:
    """Otherwise four times as many requests as there are connections leave none for the others."""
    database = pool(pool_max=8)
    lock, request = STUCK[what]
    sql("INSERT INTO projects (id, name) VALUES ('p', 'p')")
    told: list[str | None] = []
    stop = threading.Event()

    def ask_for_what_is_stuck() -> None:
        while not stop.is_set():
            try:
                ask(database, request)
            except errors.Busy as exc:
                told.append(exc.detail)

    threads = [threading.Thread(target=ask_for_what_is_stuck) for _ in range(20)]
    with session() as conn, conn.cursor() as cursor:
        cursor.execute(lock)
        for thread in threads:
            thread.start()
        took: list[float] = []
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            started = time.monotonic()
            assert ask(database) == 1
            took.append(time.monotonic() - started)
        stop.set()
        pid = conn.info.backend_pid
    for thread in threads:
        thread.join()
    assert sorted(took)[len(took) * 9 // 10] < 0.5
    assert max(took) < 1.5
    assert len(told) > 20
    assert any(f"session {pid} " in (text or "") for text in told)


def test_a_wait_for_a_lock_is_not_cut_short_while_connections_are_left(
    pool: Pool, session: Callable[[], Any], sql: Sql
) -> None:
    database = pool(pool_max=8)
    sql("INSERT INTO projects (id, name) VALUES ('p', 'p')")
    answers: list[Any] = []
    with session() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT FROM projects FOR UPDATE")
        thread = threading.Thread(target=lambda: answers.append(ask(database, "SELECT id FROM projects FOR UPDATE")))
        thread.start()
        wait_until(lambda: sql(BACKENDS + " AND wait_event_type = 'Lock'", "loom") == [(1,)])
    thread.join()
    assert answers == ["p"]


# The wrong server


def test_a_read_only_server_is_an_outage_until_it_accepts_writes(
    client: AppClient, database: Database, sql: Sql
) -> None:
    (name,) = sql("SELECT current_database()")[0]
    acquire(client)
    sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    sql(TERMINATE, "loom")
    wait_until(lambda: client.post(BUILD).status == 503 and away(database))
    assert_problem(client.post(BUILD), 503, "unavailable")
    health = client.get("/health")
    assert (health.status, health.json["database"]) == (503, "disconnected")
    assert "read-only" in health.json["dependencies"]["database"]["message"]
    sql(f"BEGIN; SET TRANSACTION READ WRITE; ALTER DATABASE {name} RESET default_transaction_read_only; COMMIT")
    wait_until(lambda: client.get("/health").status == 200)
    assert client.get(BUILD).status == 200


def test_an_open_connection_that_became_read_only_is_replaced(pool: Pool, sql: Sql) -> None:
    database = pool(pool_min=1, pool_max=1)
    sql("CREATE TABLE written (n int)")
    with database.connection() as conn:
        conn.raw.cursor().execute("SET default_transaction_read_only = on")
    with pytest.raises(errors.Unavailable):
        ask(database, "INSERT INTO written VALUES (1) RETURNING n")
    wait_until(lambda: not away(database))
    assert ask(database, "INSERT INTO written VALUES (2) RETURNING n") == 2
    assert sql("SELECT n FROM written") == [(2,)]


# One session after another


def test_a_statement_timeout_does_not_stay_on_its_connection(pool: Pool) -> None:
    database = pool(pool_min=1, pool_max=1)
    with database.connection() as conn:
        db.run(conn, "SELECT 1")
        with conn.raw.cursor() as cursor:
            cursor.execute("SHOW statement_timeout")
            assert cursor.fetchone() == ("0",)
    with database.transaction() as conn:
        db.run(conn, "SELECT 1")
    with database.connection() as conn, conn.raw.cursor() as cursor:
        cursor.execute("SHOW statement_timeout")
        assert cursor.fetchone() == ("0",)


def test_a_transaction_is_all_or_nothing(pool: Pool, sql: Sql) -> None:
    database = pool()
    sql("CREATE TABLE written (n int)")

    def write(fail: bool) -> None:
        with database.transaction() as conn:
            db.run(conn, "INSERT INTO written VALUES (1)")
            db.run(conn, "INSERT INTO written VALUES (2)")
            if fail:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        write(fail=True)
    assert sql("SELECT n FROM written") == []
    write(fail=False)
    assert sql("SELECT n FROM written") == [(1,), (2,)]
    with database.transaction():
        pass  # without a statement no transaction is begun
    assert database.usage()["idle"] == database.usage()["open"]


def test_a_connection_requested_inside_a_transaction_belongs_to_it(pool: Pool, sql: Sql) -> None:
    database = pool(pool_min=1, pool_max=1)
    sql("CREATE TABLE written (n int)")
    with pytest.raises(RuntimeError), database.transaction() as outer:  # noqa: PT012
        with database.connection() as conn:
            assert conn is outer
            db.run(conn, "INSERT INTO written VALUES (1)")
        with database.transaction() as conn:
            db.run(conn, "INSERT INTO written VALUES (2)")
        assert ask(database, "SELECT count(*) FROM written") == 2
        assert sql("SELECT n FROM written") == []
        raise RuntimeError
    assert ask(database, "SELECT count(*) FROM written") == 0
    with pytest.raises(errors.Invalid), database.transaction():
        ask(database, "SELECT 1 / 0")
    assert ask(database) == 1
    assert database.usage() == {"open": 1, "idle": 1, "waiting": 0, "max": 1}


def test_a_failed_transaction_does_not_affect_the_next(pool: Pool, sql: Sql) -> None:
    database = pool(pool_min=1, pool_max=1)
    sql("CREATE TABLE written (n int)")
    with pytest.raises(errors.Invalid), database.transaction() as conn:
        db.run(conn, "INSERT INTO written VALUES (1 / 0)")
    assert ask(database, "INSERT INTO written VALUES (3) RETURNING n") == 3
    assert sql("SELECT n FROM written") == [(3,)]


@pytest.mark.parametrize(
    ("sql_text", "error"),
    [
        ("SELECT 1 / 0", errors.Invalid),
        ("SELECT 'x'::int", errors.Invalid),
        ("SELECT 10000000000::int", errors.Invalid),
        ("INSERT INTO distributed_locks VALUES ('', NULL, 'a', 1, now(), now(), now())", errors.Invalid),
        ("INSERT INTO distributed_locks VALUES (NULL, NULL, 'a', 1, now(), now(), now())", errors.Invalid),
        ("INSERT INTO schema_version SELECT * FROM schema_version", errors.Conflict),
        ("SELECT loom_fence('build', 1)", errors.LockLost),
        ("DO 'BEGIN RAISE lock_not_available; END'", errors.Busy),
        ("DO 'BEGIN RAISE deadlock_detected; END'", errors.Undone),
        ("DO 'BEGIN RAISE serialization_failure; END'", errors.Undone),
        ("DO 'BEGIN RAISE too_many_connections; END'", errors.Unavailable),
        ("DO 'BEGIN RAISE admin_shutdown; END'", errors.Unavailable),
        ("SELECT * FROM no_such_table", errors.Error),
        ("SELEC", errors.Error),
    ],
)
def test_each_postgresql_error_has_one_error_class(pool: Pool, sql_text: str, error: type[errors.Error]) -> None:
    database = pool()
    with pytest.raises(errors.Error) as raised:
        ask(database, sql_text)
    assert type(raised.value) is error
    assert not away(database)
    assert ask(database) == 1


def test_times_are_utc_whatever_the_time_zone_of_the_server(pool: Pool, sql: Sql) -> None:
    (name,) = sql("SELECT current_database()")[0]
    sql(f"ALTER DATABASE {name} SET timezone = 'Asia/Kathmandu'")
    database = pool()
    when = ask(database, "SELECT timestamptz '2026-01-02 03:04:05+05:45' AS at")
    assert when.tzinfo is timezone.utc
    assert when.isoformat() == "2026-01-01T21:19:05+00:00"
    with database.connection() as conn:
        held = locks.acquire(conn, "build", "a", timedelta(minutes=1)).grant
    assert held is not None
    assert held.acquired_at.tzinfo is timezone.utc


def test_a_refused_connection_is_an_outage_at_once_and_shows_no_password(
    pool: Pool, postgres: Any, caplog: pytest.LogCaptureFixture
) -> None:
    database = pool(dsn=postgres.dsn("missing", tcp=True, user="nobody", password="s3cret"))
    wait_until(lambda: away(database))
    started = time.monotonic()
    for _ in range(20):
        with pytest.raises(errors.Unavailable):
            ask(database)
    assert time.monotonic() - started < MARGIN
    assert "s3cret" not in str(database.away) + caplog.text
    with pytest.raises(psycopg2.OperationalError):
        database.connect("one more")


def test_background_work_goes_on_while_requests_use_up_the_pool(
    client: AppClient, database: Database, instance: Any, sql: Sql
) -> None:
    held = acquire(client)
    borrowed: list[Any] = [database.connection() for _ in range(10)]
    for connection in borrowed:
        connection.__enter__()
    try:
        before = sql("SELECT last_heartbeat FROM instances")
        instance.beat()
        assert sql("SELECT last_heartbeat FROM instances") > before
        with locks.hold("held", ttl=1) as lock:
            sql("SELECT pg_sleep(1.5)")
            lock.ensure()
    finally:
        for connection in borrowed:
            connection.__exit__(None, None, None)
    assert client.get(BUILD).json["fencing_token"] == held["fencing_token"]


@pytest.mark.parametrize("where", ["role", "database", "dsn", "environment"])
def test_text_is_utf8_whatever_encoding_is_asked_for(
    pool: Pool, dsn: str, sql: Sql, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (role, name) = sql("SELECT current_user, current_database()")[0]
    if where in ("role", "database"):
        sql(f"ALTER {f'ROLE {role} IN' if where == 'role' else ''} DATABASE {name} SET client_encoding = 'LATIN1'")
    elif where == "environment":
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    database = pool(dsn=make_dsn(dsn, client_encoding="SQL_ASCII") if where == "dsn" else dsn)
    text = "é€\U0001f680"
    assert ask(database, "SELECT %(text)s || octet_length(%(text)s)", text=text) == text + "9"
