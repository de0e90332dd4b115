"""Puts the state of an export into an empty database: all or nothing, and exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import psycopg2
from psycopg2.extensions import cursor as Cursor

from loom import db, errors
from loom.db.connection import translate
from loom.transfer.archive import TABLES, Archive, Line
from loom.transfer.importing import CONNECT_SECONDS, refuse_instances

CHUNK = 2**20


def restore(dsn: str, archive: Archive, progress: Callable[[int, int, str], None] = lambda *_: None) -> None:
    """Raises Conflict when there is anything in the database already, or instances serve."""
    try:
        conn = db.Connection(dsn, "loom import", CONNECT_SECONDS)
    except psycopg2.Error as exc:
        raise translate(exc) from exc
    try:
        with conn.raw.cursor() as cur:
            cur.execute("SET statement_timeout = 0; SET jit = off; SET client_min_messages = 'warning'")
            conn.raw.autocommit = False
            cur.execute("SELECT set_config('loom.importing', 'on', true)")
            _refuse_if_used(cur)
            _restore(cur, archive, progress)
            conn.raw.commit()
    except psycopg2.Error as exc:
        raise translate(exc) from exc
    finally:
        conn.close()


def _refuse_if_used(cur: Cursor) -> None:
    refuse_instances(cur, "")
    for table in TABLES:
        if table not in ("cluster", "event_gaps"):
            cur.execute(f"SELECT 1 FROM {table} LIMIT 1")
            if cur.fetchone():
                raise errors.Conflict(f"There are {table} in the database already: an export goes into an empty one.")


def _restore(cur: Cursor, archive: Archive, progress: Callable[[int, int, str], None]) -> None:
    total, done = sum(archive.rows.values()), 0
    cur.execute(
        "DELETE FROM event_gaps; DELETE FROM cluster; CREATE TEMPORARY TABLE archived (line json) ON COMMIT DROP"
    )
    for table, lines in groupby(archive.lines(), key=lambda line: line.table):
        columns = ", ".join(f'"{column}"' for column in _known(cur, table, archive.header.columns[table]))
        cur.copy_expert("COPY archived FROM STDIN", _Rows(lines))
        if table == "request_logs":
            cur.execute(
                """
                SELECT open_request_logs(clock_timestamp() - oldest, 0) FROM (
                    SELECT min((line ->> 'timestamp')::timestamptz) AS oldest FROM archived) AS a
                 WHERE oldest IS NOT NULL
                """
            )
        # One statement for each table: a parent may come after its children.
        cur.execute(
            f"""
            INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE
            SELECT {columns} FROM archived, json_populate_record(NULL::{table}, line)
            """
        )
        if cur.rowcount != archive.rows[table]:
            raise errors.Conflict(f"{cur.rowcount} of {archive.rows[table]} {table} were written.")
        cur.execute("TRUNCATE archived")
        done += archive.rows[table]
        progress(done, total, f"writing {table}")
    for name, value in archive.header.sequences.items():
        cur.execute("SELECT setval(%s, GREATEST(%s, 1))", (name, value))
    # The cluster that was exported may have granted more since, and may still do: no token is given twice.
    cur.execute("UPDATE cluster SET fencing_identity = fencing_identity_now(); SELECT raise_fencing_tokens()")


def _known(cur: Cursor, table: str, columns: list[str]) -> list[str]:
    """The file's columns. Those that a later Loom has added get their defaults."""
    cur.execute("SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0", (table,))
    known = {name for (name,) in cur.fetchall()}
    unknown = [column for column in columns if column not in known]
    if unknown:
        raise errors.Conflict(f"The file has columns of {table} that this Loom does not know: {', '.join(unknown)}.")
    return columns


class _Rows:
    """A file of rows for COPY, in which each backslash is doubled."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._rest = b""

    def readline(self, size: int = CHUNK) -> bytes:
        return self.read(size)

    def read(self, size: int = CHUNK) -> bytes:
        parts, length = [self._rest], len(self._rest)
        while length < size and (line := next(self._lines, None)) is not None:
            escaped = line.row.replace(b"\\", b"\\\\")
            parts.append(escaped)
            length += len(escaped)
        whole = b"".join(parts)
        self._rest = whole[size:]
        return whole[:size]
