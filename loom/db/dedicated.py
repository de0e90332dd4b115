"""The connections of background threads and of commands, outside the pool that requests can use up."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psycopg2
import psycopg2.extensions as pgx
from psycopg2 import errors as pg

from loom import errors
from loom.db.connection import SILENCE, SLACK, WRONG_SERVER, Connection, translate
from loom.dsn import connect_problem

if TYPE_CHECKING:
    from loom.db.pool import Database


class DedicatedConnection:
    """One background thread's connection: opened when first needed, and again after a failure."""

    def __init__(self, database: Database, application_name: str) -> None:
        self._database, self._name = database, application_name
        self._conn: Connection | None = None

    @contextlib.contextmanager
    def use(self, timeout: float | None = None, lock_seconds: float | None = None) -> Iterator[Connection]:
        """Raises like `Database.connection`; `timeout` in seconds, by default that of the database.

        `lock_seconds`: for which a statement may wait for a lock.
        """
        former = self._conn
        try:
            if self._conn is None or not self._conn.usable:
                self.close()
                self._conn = self._database.connect(self._name)
            self._conn.deadline = time.monotonic() + (timeout or self._database.timeout - SLACK)
            self._conn.lock_seconds = lock_seconds
            yield self._conn
        except psycopg2.Error as exc:
            conn = self._conn or former
            # `timeout` may be short; then the end of a statement by the watchdog says nothing about the server.
            ended = conn is not None and conn.lost and not conn.was_cut
            if conn is not None and (ended or conn.seconds_taken > SILENCE or exc.pgcode in WRONG_SERVER):
                self._database.note_failure(conn, exc)
            if not isinstance(exc, pgx.QueryCanceledError | pg.LockNotAvailable):
                self.close()
            raise translate(exc) from exc

    def close(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None


NO_SUCH = (pg.UndefinedTable, pg.UndefinedFunction, pg.UndefinedColumn, pg.UndefinedObject)


@contextlib.contextmanager
def session(dsn: str, application_name: str, timeout: float) -> Iterator[Connection]:
    """One connection, for a command. `timeout`: seconds to connect, and for each statement until it is closed.

    Raises Unavailable with the reason, SchemaError when the database has not our tables and functions, and the error of
    a statement that fails.
    """
    try:
        conn = Connection(dsn, application_name, timeout)
    except psycopg2.Error as exc:
        raise errors.Unavailable(connect_problem(str(exc))) from exc
    try:
        conn.deadline = time.monotonic() + timeout
        yield conn
    except NO_SUCH as exc:
        raise errors.SchemaError(f"{str(exc).splitlines()[0]}: run loom migrate") from exc
    except psycopg2.Error as exc:
        raise type(translate(exc))(connect_problem(str(exc))) from exc
    finally:
        conn.close()
