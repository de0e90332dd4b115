"""Loom applies its schema by itself, once, never over a newer one, and with the rights that the guide grants."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from harness import Postgres
from harness.locks import Sql
from harness.postgres import SUPERUSER, binaries, query

from loom import db, errors, locks
from loom.config import resource
from loom.db import schema
from loom.state import logs

OBJECTS = """
    SELECT 'table', c.oid::regclass::text, a.attname, format_type(a.atttypid, a.atttypmod)
      FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
     WHERE c.relnamespace = 'public'::regnamespace AND NOT c.relispartition
    UNION ALL SELECT 'function', oid::regprocedure::text, '', ''
      FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL SELECT 'trigger', tgname, tgrelid::regclass::text, '' FROM pg_trigger WHERE NOT tgisinternal
     ORDER BY 1, 2, 3
"""


@pytest.fixture
def empty(postgres: Postgres) -> Iterator[str]:
    """The DSN of an empty database."""
    name = postgres.empty_database()
    yield postgres.dsn(name)
    postgres.drop(name)


def use(dsn: str) -> None:
    """Acquire, renew, check and release a lock, and make partitions, as the role in the DSN."""
    database = db.Database(dsn)
    database.open()
    try:
        with database.connection() as conn:
            held = locks.acquire(conn, "build", "a", timedelta(minutes=1)).grant
            assert held is not None
            assert not locks.acquire(conn, "build", "b", timedelta(minutes=1), wait=True).granted
            locks.renew(conn, "build", held.fencing_token, timedelta(minutes=2))
            locks.check(conn, "build", held.fencing_token)
            locks.release(conn, "build", held.fencing_token)
            logs.open_days(conn)
            assert locks.acquire(conn, "build", "b", timedelta(minutes=1)).granted
            assert [grant.ended_how for grant in locks.history(conn, limit=9)] == [None, "released"]
    finally:
        database.close()


def test_ten_instances_that_start_at_once_apply_the_schema_once(empty: str) -> None:
    with ThreadPoolExecutor(10) as threads:
        assert list(threads.map(lambda _: db.migrate(empty), range(10))) == [schema.VERSION] * 10
    assert query(empty, "SELECT version, checksum FROM schema_version") == [(schema.VERSION, schema.CHECKSUM)]
    use(empty)


def test_a_second_start_changes_nothing(empty: str) -> None:
    db.migrate(empty)
    before = query(empty, "SELECT xmin::text, applied_at FROM schema_version"), query(empty, OBJECTS)
    db.migrate(empty)
    assert (query(empty, "SELECT xmin::text, applied_at FROM schema_version"), query(empty, OBJECTS)) == before


def test_applying_the_schema_again_keeps_all_data(dsn: str, sql: Sql) -> None:
    sql("SELECT acquire_lock('held', 'a', NULL, '1 h', NULL, false), register_instance(gen_random_uuid(), 'h', '{}')")
    sql("SELECT acquire_lock('past', 'a', NULL, '1 h', NULL, false)")
    sql("DELETE FROM distributed_locks WHERE lock_name = 'past'")
    tables = ("distributed_locks", "grants", "instances", "cluster", "fencing_tokens")
    before = [sql(f"SELECT * FROM {table}") for table in tables]
    sql("UPDATE schema_version SET checksum = 'of an earlier Loom'")
    db.migrate(dsn)
    assert [sql(f"SELECT * FROM {table}") for table in tables] == before
    assert sql("SELECT checksum FROM schema_version") == [(schema.CHECKSUM,)]


def test_the_schema_can_be_applied_by_hand_repeatedly(empty: str) -> None:
    psql = [str(binaries() / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-1", "-d", empty]
    for _ in range(2):
        subprocess.run([*psql, "-f", str(resource("schema.sql"))], check=True)
    by_hand = query(empty, OBJECTS)
    use(empty)
    db.migrate(empty)
    assert query(empty, OBJECTS) == by_hand
    assert query(empty, "SELECT version, checksum FROM schema_version") == [(schema.VERSION, schema.CHECKSUM)]


def test_a_newer_schema_is_refused_and_unchanged(dsn: str, sql: Sql) -> None:
    sql("UPDATE schema_version SET version = version + 1, checksum = 'newer'")
    newer = rf"schema version {schema.VERSION + 1}, this Loom knows {schema.VERSION}: upgrade"
    with pytest.raises(errors.SchemaError, match=newer):
        db.migrate(dsn)
    assert sql("SELECT version, checksum FROM schema_version") == [(schema.VERSION + 1, "newer")]


def test_a_failed_migration_leaves_nothing_behind(empty: str) -> None:
    query(empty, "CREATE FUNCTION loom_fence(name text, token bigint) RETURNS text LANGUAGE sql AS 'SELECT name'")
    with pytest.raises(errors.Error):
        db.migrate(empty)
    assert query(empty, "SELECT to_regclass('instances'), to_regclass('schema_version')") == [(None, None)]


def test_after_the_guides_steps_the_error_names_the_one_missing_grant(postgres: Postgres, empty: str) -> None:
    """Since PostgreSQL 15 GRANT ALL ON DATABASE does not allow to create tables; before, it is all that is needed."""
    (name,) = query(empty, "SELECT current_database()")[0]
    user = f"loom_user_{name}"
    postgres.query(f"CREATE USER {user} WITH ENCRYPTED PASSWORD 'your_secure_password'")
    postgres.query(f"GRANT ALL PRIVILEGES ON DATABASE {name} TO {user}")
    dsn = postgres.dsn(name, tcp=True, user=user, password="your_secure_password")
    try:
        if postgres.query("SELECT current_setting('server_version_num')::int >= 150000") == [(True,)]:
            with pytest.raises(errors.SchemaError) as refused:
                db.migrate(dsn)
            text = str(refused.value)
            assert "\n" not in text
            assert "your_secure_password" not in text
            command = re.search(r'psql (\S+) -c "([^"]+)"', text)
            assert command is not None, text
            assert (command[1], command[2].count(";")) == (name, 0), "one statement, as an operator would paste it"
            postgres.query(command[2], database=command[1])
        db.migrate(dsn)
        use(dsn)
        assert query(dsn, "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'") == [(user,)]
    finally:
        postgres.query(f"REASSIGN OWNED BY {user} TO {SUPERUSER}", database=name)
        postgres.query(f"DROP OWNED BY {user}", database=name)
        postgres.query(f"DROP OWNED BY {user}")
        postgres.query(f"DROP USER {user}")


def test_a_role_without_create_rights_starts_on_an_existing_schema(postgres: Postgres, dsn: str) -> None:
    """Where an administrator applies the schema, Loom's role only needs rights on the data."""
    (name,) = query(dsn, "SELECT current_database()")[0]
    user = f"plain_{name}"
    postgres.query(f"CREATE USER {user}")
    for statement in (
        f"GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA public TO {user}",
        f"GRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA public TO {user}",
        f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO {user}",
    ):
        query(dsn, statement)
    try:
        own = postgres.dsn(name, user=user)
        assert db.migrate(own) == schema.VERSION
        use(own)
    finally:
        postgres.query(f"DROP OWNED BY {user}", database=name)
        postgres.query(f"DROP USER {user}")


def test_an_unreachable_server_is_reported_without_its_password(postgres: Postgres) -> None:
    dsn = postgres.dsn("no_such_database", tcp=True, user="nobody", password="s3cret")
    with pytest.raises(errors.Unavailable) as away:
        db.migrate(dsn)
    assert "no_such_database" in str(away.value) or "nobody" in str(away.value)
    assert "s3cret" not in str(away.value)


def test_names_and_ids_do_not_depend_on_the_c_library(sql: Sql) -> None:
    """An upgrade of libc can change collations and so corrupt unique indexes: then a lock has two holders."""
    rows = sql(
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public'"
        " AND (column_name IN ('lock_name', 'owner', 'id', 'key', 'parent', 'assigned_to') OR column_name LIKE '%%_id')"
        " AND data_type = 'text'"
        " AND collation_name IS DISTINCT FROM 'C'"
    )
    assert rows == []


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_in_another_encoding_is_refused_in_one_line(postgres: Postgres, dsn: str, encoding: str) -> None:
    name = f"in_{encoding.lower()}"
    query(dsn, f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    try:
        with pytest.raises(errors.SchemaError) as refused:
            db.migrate(postgres.dsn(name))
        assert re.fullmatch(f"the database {name} has the encoding {encoding}, Loom needs UTF8: .*", str(refused.value))
    finally:
        postgres.drop(name)
