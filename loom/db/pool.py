"""A worker's pool of connections. One daemon thread opens them, never a request.

While the database cannot be reached ("away"), this thread keeps trying, and every request is refused at once.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

import psycopg2
from psycopg2 import errors as pg

from loom import errors, metrics
from loom.db.connection import SLACK, WRONG_SERVER, Connection, translate
from loom.db.dedicated import DedicatedConnection
from loom.db.lock_waits import LockWaits
from loom.dsn import connect_problem

log = logging.getLogger("loom.db")

PROBE_PERIOD = 0.25  # seconds between two attempts to reach a database that is away
REPLACEMENT_SECONDS = 0.3  # seconds for which requests wait for a new connection after one was lost


class Database:
    """A worker's connections. Create it after the fork, then call `open()`; `close()` ends it."""

    def __init__(
        self,
        dsn: str | Callable[[], str],
        *,
        pool_min: int = 2,
        pool_max: int = 10,
        timeout: float = 5.0,
        lock_seconds: float = 1.0,
        application_name: str = "loom",
        before_connect: Callable[[], object] | None = None,
    ) -> None:
        """`dsn`: or what returns it, for passwords that change. `before_connect` may start the embedded server.

        `timeout`: seconds that a request may take. `lock_seconds`: for which it may wait for a lock while at most half
        of the connections are in use; see LockWaits.
        """
        self._dsn, self.timeout, self.application_name = dsn, timeout, application_name
        self.lock_waits = LockWaits(pool_max, lock_seconds)
        self._min, self._max, self._before_connect = pool_min, pool_max, before_connect
        self._idle: list[Connection] = []
        self._open = 0
        self._connecting_since: float | None = None
        self._lost_at: float | None = None  # a connection was lost then, and no new one has been opened since
        self._away: str | None = None
        self.away_since: float | None = None  # time.time()
        self._closed = False
        self._lock = threading.Lock()
        self._connection_needed = threading.Condition(self._lock)  # wakes the connecting thread
        self._waiters: deque[ConnectionWaiter] = deque()
        self._thread_state = ThreadState()

    @property
    def dsn(self) -> str:
        """That of a connection which is made now. Raises psycopg2.OperationalError."""
        return self._dsn() if callable(self._dsn) else self._dsn

    def open(self) -> None:
        threading.Thread(target=self._run_connector, name="db-connector", daemon=True).start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._drop_all()

    @property
    def away(self) -> str | None:
        """Why the database cannot be reached now, or None. The text contains no password."""
        return self._away

    def usage(self) -> dict[str, int]:
        """The pool's counters: open and idle connections, requests that wait for one, and the most connections."""
        with self._lock:
            return {"open": self._open, "idle": len(self._idle), "waiting": len(self._waiters), "max": self._max}

    def start_request(self, received: float | None = None) -> None:
        """Sets this thread's deadline for the request that begins, including its waits for a connection.

        `received`: when the request arrived (time.monotonic()), if that was earlier: it may have waited for a thread.
        """
        self._thread_state.deadline = (received or time.monotonic()) + self.timeout - SLACK
        self._thread_state.repeatable = True
        self._thread_state.seconds_spent = 0.0

    @property
    def request_deadline(self) -> float:
        """When the time of this thread's request is over, on the monotonic clock."""
        return self._thread_state.deadline or time.monotonic() + self.timeout - SLACK

    @property
    def seconds_spent(self) -> float:
        """How long the statements of this thread's request have taken."""
        return self._thread_state.seconds_spent

    @property
    def repeatable(self) -> bool:
        """Whether this thread's request may be repeated, because none of its statements can have been committed."""
        return self._thread_state.repeatable

    def connection(self) -> BorrowedConnection:
        """A connection on which each statement is its own transaction; inside `transaction()`, the connection of that.

        Raises Unavailable when the database is away, or becomes unreachable during a statement (whose outcome is then
        unknown), Busy when no time is left, Invalid or Conflict when PostgreSQL refuses a value.
        """
        if self._thread_state.transaction is None:
            self._thread_state.repeatable = False
        return BorrowedConnection(self)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A connection in one transaction; BEGIN is sent with the first statement. Raises like `connection`.

        Calls of `connection` and `transaction` inside it, in the same thread, join this transaction.
        """
        state = self._thread_state
        with BorrowedConnection(self) as conn:
            if state.transaction is not None:
                yield conn
                return
            conn.begin()
            state.transaction = conn
            try:
                yield conn
            except BaseException:
                with contextlib.suppress(psycopg2.Error):
                    conn.end("ROLLBACK")
                raise
            finally:
                state.transaction = None
            conn.end("COMMIT")
            state.repeatable = False

    def dedicated(self, name: str) -> DedicatedConnection:
        """A connection for one background thread, outside the pool that requests can use up."""
        return DedicatedConnection(self, f"{self.application_name} {name}")

    def connect(self, application_name: str) -> Connection:
        if self._before_connect is not None:
            try:
                self._before_connect()
            except Exception as exc:
                raise psycopg2.OperationalError(str(exc)) from exc
        return Connection(self.dsn, application_name, self.timeout - SLACK)

    def take(self) -> Connection:
        """Takes an idle connection, or waits for the next one, first come, first served. Raises Unavailable, Busy."""
        conn = self._take()
        with self._lock:
            conn.lock_seconds = self.lock_waits.lend(conn)
        return conn

    def _take(self) -> Connection:
        deadline = self.request_deadline
        with self._lock:
            if self._away is not None:
                raise errors.Unavailable()
            while self._idle:
                conn = self._idle.pop()
                if conn.usable:
                    conn.deadline = deadline
                    return conn
                self._drop(conn)
            waiter = ConnectionWaiter()
            self._waiters.append(waiter)
            self._connection_needed.notify()
        with metrics.connection_wait.time():
            while (
                not waiter.wait(min(REPLACEMENT_SECONDS, deadline - time.monotonic())) and time.monotonic() < deadline
            ):
                with self._lock:
                    if self._lost_at is not None and time.monotonic() - self._lost_at > REPLACEMENT_SECONDS:
                        self._set_away("connections are lost, and no new one comes")
        with self._lock:
            if waiter.conn is not None:
                waiter.conn.deadline = deadline
                return waiter.conn
            if self._away is not None:
                raise errors.Unavailable()
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if self._connecting_since is not None and time.monotonic() - self._connecting_since > 1:
                self._set_away("the server does not answer")
                raise errors.Unavailable()
        raise errors.Busy("All connections of this instance are in use.")

    def give_back(self, conn: Connection) -> None:
        """Passes the connection to the longest waiter, or back into the pool; closes it if it is broken."""
        reusable = conn.reusable
        with self._lock:
            self.lock_waits.take_back(conn)
            if reusable and self._away is None and not self._closed:
                self._pass_on(conn)
            else:
                self._drop(conn)
                self._connection_needed.notify()

    def note_failure(self, conn: Connection, exc: psycopg2.Error) -> None:
        """Decides from an error whether the database is away: a silent or a read-only server is.

        After one lost connection it may be. Behind a pooler, idle connections look usable although their server is
        dead, so all of them are closed, and requests wait until a new connection shows that the server is there.
        """
        with self._lock:
            if conn.fell_silent or exc.pgcode in WRONG_SERVER:
                conn.was_cut = True
                self._set_away(
                    "the server is read-only" if exc.pgcode in WRONG_SERVER else "the server does not answer"
                )
            elif conn.lost and self._away is None:
                self._lost_at = self._lost_at or time.monotonic()
                while self._idle:
                    self._drop(self._idle.pop())
                self._connection_needed.notify()

    def _drop(self, conn: Connection) -> None:
        self._open -= 1
        conn.close()

    def _set_away(self, why: str) -> None:
        """Refuses all requests until a connection can be opened. The caller holds `_lock`."""
        if self._away is None:
            log.error("database-away", extra={"fields": {"reason": why}})
            metrics.count_failover("database_lost")
            self.away_since = time.time()
        self._away = why
        self._drop_all()

    def _drop_all(self) -> None:
        """Closes the idle connections, ends the waits for one, and wakes the connecting thread."""
        while self._idle:
            self._drop(self._idle.pop())
        self._release_waiters()
        self._connection_needed.notify()

    def _pass_on(self, conn: Connection) -> None:
        if self._waiters:
            self._waiters.popleft().receive(conn)
        else:
            self._idle.append(conn)

    def _release_waiters(self) -> None:
        while self._waiters:
            self._waiters.popleft().receive(None)

    def _must_connect(self) -> bool:
        more = bool(self._waiters) and self._open < self._max
        doubt = self._away is not None or self._lost_at is not None
        return self._closed or doubt or self._open < self._min or more

    def _run_connector(self) -> None:
        while True:
            with self._lock:
                self._connection_needed.wait_for(self._must_connect)
                if self._closed:
                    return
                self._connecting_since = time.monotonic()
            conn, why = None, ""
            try:
                conn = self.connect(self.application_name)
            except Exception as exc:
                why = connect_problem(str(exc)) or type(exc).__name__
            with self._lock:
                self._connecting_since = None
                if conn is None:
                    # With others open, the server is there: "too many clients" does not mean that it is away.
                    if not self._open or self._lost_at is not None:
                        self._set_away(why)
                elif self._closed:
                    conn.close()
                else:
                    if self._away is not None:
                        log.warning("database-back")
                        metrics.count_failover("database_regained")
                    self._away = self._lost_at = self.away_since = None
                    self._open += 1
                    self._pass_on(conn)
            if conn is None:
                time.sleep(PROBE_PERIOD * random.uniform(0.8, 1.2))


class ThreadState(threading.local):
    """Of each thread: its deadline, its open transaction, whether its request may be repeated, and its statements'
    time."""

    deadline: float | None = None
    transaction: Connection | None = None
    repeatable = True
    seconds_spent = 0.0


class ConnectionWaiter:
    """A request that waits for a connection. It receives one, or None when the database is away."""

    __slots__ = ("_received", "conn")

    def __init__(self) -> None:
        self.conn: Connection | None = None
        self._received = threading.Lock()
        self._received.acquire()

    def wait(self, seconds: float) -> bool:
        return self._received.acquire(timeout=max(0.0, seconds))

    def receive(self, conn: Connection | None) -> None:
        self.conn = conn
        self._received.release()


class BorrowedConnection:
    """Context manager: a connection of the pool, given back at the end. A generator would take three times as long."""

    __slots__ = ("_conn", "_database", "_joined")

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> Connection:
        self._joined = self._database._thread_state.transaction
        self._conn = self._joined or self._database.take()
        if self._joined is None:
            self._conn.seconds_spent = 0.0
        return self._conn

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        refused: BaseException | None = exc
        if isinstance(exc, psycopg2.Error):
            self._database.note_failure(self._conn, exc)
            refused = translate(exc)
        if self._joined is None:
            self._database._thread_state.seconds_spent += self._conn.seconds_spent
            if isinstance(exc.__cause__ if isinstance(exc, errors.Busy) else exc, pg.LockNotAvailable):
                refused = errors.Busy(self._database.lock_waits.describe_blocker(self._conn))
            self._database.give_back(self._conn)
        if refused is not None and refused is not exc:
            raise refused from exc
