"""Applies schema.sql and loom/sql/: once, by the first instance to start, and never over a newer schema."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import psycopg2
from psycopg2 import errors as pg

from loom import config, errors
from loom.db.connection import Connection, translate
from loom.dsn import connect_problem


def read(file: Path) -> str:
    """A file of SQL with the files that it includes by psql's \\ir."""
    return re.sub(r"^\\ir (\S+)$", lambda include: read(file.parent / include[1]), file.read_text(), flags=re.MULTILINE)


TEXT = read(config.resource("schema.sql"))
VERSION = int(re.search(r"Schema version (\d+)", TEXT)[1])  # type: ignore[index]
CHECKSUM = hashlib.sha256(TEXT.encode()).hexdigest()
KEY = "1282371437, 0"  # of the advisory lock that is held while the schema changes; see own_locks()


def migrate(dsn: str | Callable[[], str], timeout: float = 60.0) -> int:
    """Brings the database to this Loom's schema if it is older, and returns the schema's version.

    `timeout`: seconds to connect, and again for the rest. Raises SchemaError when the database is newer than this Loom
    or the role may not create tables (the text contains the statement that fixes it), Unavailable when the database
    cannot be reached.
    """
    try:
        conn = Connection(dsn() if callable(dsn) else dsn, "loom migrate", timeout)
    except psycopg2.Error as exc:
        raise errors.Unavailable(connect_problem(str(exc))) from exc
    conn.deadline = time.monotonic() + timeout
    try:
        encoding = conn.raw.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise errors.SchemaError(
                f"the database {conn.raw.info.dbname} has the encoding {encoding}, Loom needs UTF8: create one with"
                " CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0"
            )
        conn.begin()
        conn.execute(f"SELECT pg_advisory_xact_lock({KEY})")
        found = applied(conn)
        if found is not None and found[0] > VERSION:
            raise errors.SchemaError(
                f"the database has schema version {found[0]}, this Loom knows {VERSION}: upgrade this Loom"
            )
        if found != (VERSION, CHECKSUM) and (found != (VERSION, None) or _owned(conn)):
            if found is not None:
                conn.execute(LOCK_TABLES)
            conn.execute(TEXT)
            conn.execute("UPDATE schema_version SET checksum = %(checksum)s", {"checksum": CHECKSUM})
        conn.end("COMMIT")
    except pg.InsufficientPrivilege as exc:
        raise errors.SchemaError(_remedy(conn, exc)) from exc
    except psycopg2.Error as exc:
        raise translate(exc) from exc
    finally:
        conn.close()
    return VERSION


# Locks all tables, or none: with a schema that locks one after the other, the requests of running instances deadlock.
# Each attempt keeps them waiting for 0.1 s at most, and the schema itself then for about as long.
LOCK_TABLES = """
    SET LOCAL lock_timeout = '100ms';
    DO $$
    DECLARE
        tables text := (SELECT string_agg(format('%I.%I', schemaname, tablename), ', ') FROM pg_tables
                         WHERE schemaname = current_schema() AND pg_has_role(tableowner, 'USAGE'));
    BEGIN
        WHILE tables IS NOT NULL LOOP
            BEGIN
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', tables);
                EXIT;
            EXCEPTION WHEN lock_not_available THEN
                PERFORM pg_sleep(0.1);
            END;
        END LOOP;
    END $$;
    SET LOCAL lock_timeout = 0
"""


def applied(conn: Connection) -> tuple[int, str | None] | None:
    """The version and the checksum of the database's schema, or None. Without a checksum it was applied by hand."""
    if not conn.execute("SELECT to_regclass('schema_version') IS NOT NULL AS it")[0]["it"]:
        return None
    rows = conn.execute("SELECT version, checksum FROM schema_version")
    return (rows[0]["version"], rows[0]["checksum"]) if rows else None


def _owned(conn: Connection) -> bool:
    """Whether this role may apply the schema. Another one relies on what the owner has applied by hand."""
    sql = """
        SELECT pg_has_role(tableowner, 'USAGE') AS it FROM pg_tables
         WHERE schemaname = current_schema() AND tablename = 'schema_version'
        """
    return any(row["it"] for row in conn.execute(sql))


def _remedy(conn: Connection, exc: psycopg2.Error) -> str:
    """Since PostgreSQL 15, GRANT ALL ON DATABASE does not let a role create tables in the schema `public`."""
    conn.end("ROLLBACK")
    can = conn.execute(
        """
        SELECT current_user AS role, current_database() AS database,
               has_schema_privilege(coalesce(current_schema, 'public'), 'CREATE') AS may_create,
               (SELECT tableowner FROM pg_tables WHERE tablename = 'schema_version' AND tableowner <> current_user
                   AND schemaname = current_schema) AS owner,
               format('GRANT USAGE, CREATE ON SCHEMA %I TO %I', coalesce(current_schema, 'public'), current_user)
                   AS remedy
        """
    )[0]
    if can["owner"] is not None:
        return f"the schema of database {can['database']} must be upgraded: run loom migrate as role {can['owner']}"
    if can["may_create"]:
        return f"role {can['role']} may not apply the schema to {can['database']}: {str(exc).splitlines()[0]}"
    return (
        f"role {can['role']} may not create tables in database {can['database']}; "
        f'run once as a superuser: psql {can["database"]} -c "{can["remedy"]}"'
    )
