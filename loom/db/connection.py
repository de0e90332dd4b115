"""One session with PostgreSQL, in which every wait has a bound.

A daemon thread shuts down the socket of a connection that has passed its deadline. Nothing else ends every kind of
silence: statement_timeout, tcp_user_timeout and keepalives each miss a case when a peer drops packets.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import threading
import time
from datetime import datetime, timezone
from typing import Annotated, Any

import msgspec
import psycopg2
import psycopg2.extensions as pgx
import psycopg2.extras

from loom import errors, metrics, refusals

Row = dict[str, Any]
Time = Annotated[datetime, msgspec.Meta(tz=True)]  # with a time zone, as the database returns it

TICK = 0.05  # seconds between two checks of the watchdog
SLACK = 0.2  # seconds of a request's time limit that are kept for the work after its last statement
IDLE_TRUSTED = 1.0  # seconds for which an idle connection is used without a check
SILENCE = 1.0  # seconds without an answer after which a broken connection counts as a silent server
STATEMENT_SHARE = 0.85  # of the time left: a slow server reports its own timeout before the watchdog takes it for dead

psycopg2.extras.register_default_jsonb(globally=True, loads=msgspec.json.decode)


def _utc(text: str | bytes | None, cursor: Any) -> datetime | None:
    value = pgx.PYDATETIMETZ(text, cursor)
    return value.astimezone(timezone.utc) if isinstance(value, datetime) else value


pgx.register_type(pgx.new_type((1184,), "TIMESTAMPTZ_UTC", _utc))

WRONG_SERVER = ("25006", "0A000")  # read-only, or in recovery: a demoted primary, a standby
UNDONE = ("40001", "40P01")  # serialization failure, deadlock: rolled back as a whole, and may succeed when repeated
REPEATS = 3
RECENT_STATEMENTS = 256  # whose columns a connection remembers, and at most so many characters of each:
LONG_STATEMENT = 10_000

# SQLSTATE -> what it means to the caller. Two characters are a class; the longer match wins.
_CLASSES: dict[str, type[errors.Error]] = {
    "0A000": errors.Unavailable,  # an unlogged table in recovery: a standby
    "08": errors.Unavailable,  # connection exception
    "25006": errors.Unavailable,  # read-only: a demoted server, so the wrong one
    "53": errors.Exhausted,  # insufficient resources: a full disk, a full table of locks
    "53300": errors.Unavailable,  # too many clients
    "57": errors.Unavailable,  # operator intervention: shut down, starting up
    "57014": errors.Busy,  # statement_timeout
    "55P03": errors.Busy,  # lock_not_available
    "40": errors.Busy,  # a transaction that was rolled back
    **dict.fromkeys(UNDONE, errors.Undone),
    "22": errors.Invalid,  # data exception
    "23": errors.Invalid,  # a constraint
    "23505": errors.Conflict,  # unique
}


def translate(exc: psycopg2.Error) -> errors.Error:
    """Our error for one of PostgreSQL's. PostgreSQL's text reaches the caller only if its request was wrong."""
    refused = refusals.from_postgres(exc)
    if refused is not None:
        return refused
    state = exc.pgcode or ""
    kind = _CLASSES.get(state) or _CLASSES.get(state[:2])
    if kind is None:
        kind = (
            errors.Unavailable if isinstance(exc, psycopg2.OperationalError | psycopg2.InterfaceError) else errors.Error
        )
    said = exc.diag.message_primary if exc.diag is not None else None
    return kind(said if issubclass(kind, errors.Invalid | errors.Conflict) else None)


class Watchdog:
    """One daemon thread per process, which shuts down the socket of each connection that has passed its deadline."""

    def __init__(self) -> None:
        self._watched: set[Connection] = set()
        self._lock = threading.Lock()
        self._pid = 0

    def add(self, conn: Connection) -> None:
        with self._lock:
            self._watched.add(conn)
            if self._pid != os.getpid():
                self._pid = os.getpid()
                threading.Thread(target=self._run, name="db-watchdog", daemon=True).start()

    def remove(self, conn: Connection) -> None:
        with self._lock:
            self._watched.discard(conn)

    def _run(self) -> None:
        while True:
            time.sleep(TICK)
            now = time.monotonic()
            with self._lock:
                overdue = [c for c in self._watched if (at := c.cut_at) is not None and at < now]
            for conn in overdue:
                conn.cut()


_watchdog = Watchdog()


class Connection:
    """One session with the server. Each statement is one round trip and has a deadline."""

    def __init__(self, dsn: str, application_name: str, timeout: float) -> None:
        """Connects. Raises psycopg2.OperationalError, also for a read-only server (a standby, a demoted primary)."""
        info = pgx.parse_dsn(dsn)
        hosts = max(info.get("host", "").count(","), info.get("hostaddr", "").count(",")) + 1
        bounds = {
            "application_name": application_name,
            "connect_timeout": max(1, int(timeout - 1) // hosts),  # libpq applies it to each host
            "keepalives_idle": 2,
            "keepalives_interval": 1,
            "keepalives_count": 2,
            "tcp_user_timeout": int(timeout * 800),
        }
        # Whatever the DSN, the role or the environment asks for: texts are UTF-8 in the whole of Loom.
        options = {"client_encoding": "UTF8", **{k: v for k, v in bounds.items() if k not in info}}
        self.raw = psycopg2.connect(dsn, **options)
        self.raw.autocommit = True
        self.raw.notices = metrics.Notices()
        self._socket = socket.socket(fileno=os.dup(self.raw.fileno()))
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._prefix = ""
        self._begun = False
        self._names: dict[str, list[str]] = {}  # column names of recent statements: the cursor takes 6 us for them
        self.was_cut = False
        self.last_used = self.seconds_taken = 0.0  # when the last statement ended, and how long it took
        self.seconds_spent = 0.0  # by all statements since it was lent
        self.cut_at: float | None = None
        self.began: float | None = None  # the statement that is running now
        self.deadline = time.monotonic() + timeout
        self.lock_seconds: float | None = None  # for which a statement may wait for a lock; None: for all its time
        _watchdog.add(self)
        try:
            # Times in JSON that PostgreSQL builds are in the session's time zone; pgBouncer keeps it for each client.
            begin = "SET timezone = 'UTC'; SELECT current_setting('transaction_read_only') AS it"
            if self.execute(begin)[0]["it"] == "on":
                raise psycopg2.OperationalError("the server is read-only: a standby or a demoted primary")
        except BaseException:
            self.close()
            raise

    def execute(
        self, sql: str, params: dict[str, Any] | None = None, *, commit: bool = False, as_bytes: bool = False
    ) -> list[Row]:
        """Runs one statement in the time left until `deadline`, and returns its rows. Raises psycopg2.Error.

        Outside a transaction it is repeated after a deadlock or a serialization failure. `commit` commits the current
        transaction in the same message. `as_bytes` returns texts in UTF-8: as `str`, they can take four times as much.
        """
        if commit:
            rows = self._execute(f"{sql}; COMMIT", params)
            self._begun = False
            return rows
        for _ in range(0 if self._begun else REPEATS):
            try:
                return self._execute(sql, params, as_bytes)
            except pgx.TransactionRollbackError as exc:
                if exc.pgcode not in UNDONE:
                    raise
        return self._execute(sql, params, as_bytes)

    def _execute(self, sql: str, params: dict[str, Any] | None, as_bytes: bool = False) -> list[Row]:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise errors.Busy()
        bound = max(1, int(left * STATEMENT_SHARE * 1000))
        prefix, self._prefix = self._prefix, ""
        bounds = f"SET LOCAL statement_timeout = {bound}; "
        if self.lock_seconds is not None:
            bounds += f"SET LOCAL lock_timeout = {int(self.lock_seconds * 1000)}; "
        self.cut_at, self.began = self.deadline, time.monotonic()
        try:
            with self.raw.cursor() as cursor:
                if as_bytes:
                    pgx.register_type(pgx.BYTES, cursor)
                cursor.execute(f"{prefix}{bounds}{sql}", params or None)
                if cursor.description is None:
                    return []
                names = self._names.pop(sql, None) or [column.name for column in cursor.description]
                if len(sql) < LONG_STATEMENT:
                    self._names[sql] = names
                    if len(self._names) > RECENT_STATEMENTS:
                        del self._names[next(iter(self._names))]
                return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        finally:
            self.cut_at = self.began = None
            self.last_used = time.monotonic()
            self.seconds_taken = self.last_used - (self.deadline - left)
            self.seconds_spent += self.seconds_taken

    def copy(self, sql: str, text: str) -> None:
        """Runs COPY ... FROM STDIN in a transaction that an earlier statement has begun, and bounded."""
        self.cut_at, self.began = self.deadline, time.monotonic()
        try:
            with self.raw.cursor() as cursor:
                cursor.copy_expert(sql, io.BytesIO(text.encode()), 1 << 16)
        finally:
            self.last_used = time.monotonic()
            self.seconds_taken = self.last_used - self.began
            self.cut_at = self.began = None

    def begin(self) -> None:
        """Begins a transaction: BEGIN is sent together with the next statement."""
        self._prefix = "BEGIN; "
        self._begun = True

    def end(self, how: str) -> None:
        """Sends COMMIT or ROLLBACK, unless BEGIN was never sent or the last statement has already committed."""
        begun, self._begun = self._begun, False
        if self._prefix:
            self._prefix = ""
        elif begun and not self.raw.closed:
            began = time.monotonic()
            self.cut_at = max(self.deadline, began + SLACK)
            try:
                with self.raw.cursor() as cursor:
                    cursor.execute(how)
                    if cursor.statusmessage != how:  # COMMIT of a transaction in which a statement failed
                        raise psycopg2.InternalError("a statement of the transaction failed: rolled back")
            finally:
                self.cut_at = None
                self.seconds_spent += time.monotonic() - began

    @property
    def lost(self) -> bool:
        """Closed by the server, the network or the watchdog, not by `close()`."""
        return bool(self.raw.closed)

    @property
    def fell_silent(self) -> bool:
        """Closed by the watchdog, or after a long wait by the kernel (tcp_user_timeout, keepalives)."""
        return self.was_cut or (self.lost and self.seconds_taken > SILENCE)

    @property
    def usable(self) -> bool:
        """Not known to be dead. After a long idle time, the socket is readable if the server has closed it."""
        if self.was_cut or self.raw.closed:
            return False
        # A poll releases the interpreter's lock, which other threads then take, so it is not done every time.
        return time.monotonic() - self.last_used < IDLE_TRUSTED or not self._poll.poll(0)

    @property
    def reusable(self) -> bool:
        """Outside a transaction, and not known to be dead."""
        return not self.was_cut and self.raw.info.transaction_status == pgx.TRANSACTION_STATUS_IDLE

    def cut(self) -> None:
        """Shuts down the socket from another thread, so that every wait on this connection ends."""
        self.was_cut = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        _watchdog.remove(self)
        self.cut_at = None
        if self.was_cut or self.raw.closed:  # otherwise libpq would send a message to a server that does not answer
            self.cut()
        self._socket.close()
        self.raw.close()
