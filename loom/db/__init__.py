"""PostgreSQL: `connection()` and `transaction()` of the process's `Database`, and what runs statements on them."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone
from typing import Any

from loom import errors
from loom.db.connection import Connection, Row, Time
from loom.db.dedicated import DedicatedConnection, session
from loom.db.pages import Page, begin_large_page, end_of_answer
from loom.db.pool import Database
from loom.db.schema import migrate


def one(conn: Connection, sql: str, **params: Any) -> Row | None:
    """The statement's first row, or None."""
    found = conn.execute(sql, params)
    return found[0] if found else None


def row(conn: Connection, sql: str, **params: Any) -> Row:
    """The row of a statement that always has one."""
    return conn.execute(sql, params)[0]


def value(conn: Connection, sql: str, **params: Any) -> Any:
    """The value of a statement that always has one row with one column."""
    (found,) = row(conn, sql, **params).values()
    return found


def rows(conn: Connection, sql: str, **params: Any) -> list[Row]:
    return conn.execute(sql, params)


def run(conn: Connection, sql: str, **params: Any) -> None:
    conn.execute(sql, params)


_default: Database | None = None


def configure(database: Database | None) -> None:
    """Sets the process's database, which `default()`, `connection()` and `transaction()` use."""
    global _default
    _default = database


def default() -> Database:
    if _default is None:
        raise errors.Unavailable("No database has been opened in this process.")
    return _default


def away() -> tuple[datetime | None, str | None]:
    """Since when the database cannot be reached, by this host's clock, and why; None while it can be."""
    if _default is None or _default.away_since is None:
        return None, None
    return datetime.fromtimestamp(_default.away_since, timezone.utc), _default.away


def seconds_spent() -> float:
    """How long the statements of this thread's request have taken since `start_request`."""
    return 0.0 if _default is None else _default.seconds_spent


def connection() -> contextlib.AbstractContextManager[Connection]:
    return default().connection()


def transaction() -> contextlib.AbstractContextManager[Connection]:
    return default().transaction()
