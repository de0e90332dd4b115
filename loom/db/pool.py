"""A worker's pool. Requests never dial: one daemon thread does, and is also the probe while the database is away.

Until it gets through, every request is refused at once: a broken dependency costs each of them nothing.
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
import psycopg2.extensions as pgx

from loom import errors
from loom.config import mask
from loom.db.connection import SILENCE, SLACK, WRONG_SERVER, Connection, translate

log = logging.getLogger("loom.db")

PROBE_PERIOD = 0.25  # seconds between two tries to reach a database that is away
PATIENCE = 0.3  # seconds for which requests wait for a new connection after one was lost


class Database:
    """A worker's connections. Make it after the fork, then `open()`; `close()` ends it."""

    def __init__(
        self,
        dsn: str,
        *,
        pool_min: int = 2,
        pool_max: int = 10,
        timeout: float = 5.0,
        application_name: str = "loom",
        before_dial: Callable[[], object] | None = None,
    ) -> None:
        """`timeout`: seconds that a request may take. `before_dial` may start a server that we keep ourselves."""
        self.dsn, self.timeout, self.application_name = dsn, timeout, application_name
        self._min, self._max, self._before_dial = pool_min, pool_max, before_dial
        self._idle: list[Connection] = []
        self._open = 0
        self._dialing_since: float | None = None
        self._lost_at: float | None = None  # since when no new connection has shown that the server is there
        self._away: str | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # the dialer has something to do
        self._turns: deque[Turn] = deque()
        self._request = Request()

    def open(self) -> None:
        threading.Thread(target=self._dial_for_all, name="db-dialer", daemon=True).start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            while self._idle:
                self._drop(self._idle.pop())
            self._release_turns()
            self._work.notify()

    @property
    def away(self) -> str | None:
        """Why the database cannot be reached now, or None. The text bears no password."""
        return self._away

    def usage(self) -> dict[str, int]:
        """The pool's counters: connections open and idle, requests waiting for one, and the most there may be."""
        with self._lock:
            return {"open": self._open, "idle": len(self._idle), "waiting": len(self._turns), "max": self._max}

    def start_request(self) -> None:
        """Sets this thread's deadline for all that follows, the wait for a connection included."""
        self._request.deadline = time.monotonic() + self.timeout - SLACK
        self._request.untouched = True

    @property
    def untouched(self) -> bool:
        """Whether this thread's request may be repeated: nothing that it did can have been committed."""
        return self._request.untouched

    def connection(self) -> Lease:
        """A connection on which each statement is a transaction of its own; inside `transaction()`, that one's.

        Raises Unavailable when the database is away or goes away meanwhile (then the outcome is unknown), Busy when
        there is no time left, Invalid or Conflict for what PostgreSQL refuses.
        """
        if self._request.transaction is None:
            self._request.untouched = False
        return Lease(self)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A connection in one transaction: BEGIN travels with the first statement. Raises as `connection`.

        What this thread asks for inside, be it a connection or a transaction, is this one: all of it or nothing.
        """
        request = self._request
        with Lease(self) as conn:
            if request.transaction is not None:
                yield conn
                return
            conn.begin()
            request.transaction = conn
            try:
                yield conn
            except BaseException:
                with contextlib.suppress(psycopg2.Error):
                    conn.end("ROLLBACK")
                raise
            finally:
                request.transaction = None
            conn.end("COMMIT")
            request.untouched = False

    def dedicated(self, name: str) -> Dedicated:
        """A connection for one background thread, that requests cannot use up."""
        return Dedicated(self, f"{self.application_name} {name}")

    def dial(self, application_name: str) -> Connection:
        if self._before_dial is not None:
            try:
                self._before_dial()
            except Exception as exc:
                raise psycopg2.OperationalError(str(exc)) from exc
        return Connection(self.dsn, application_name, self.timeout - SLACK)

    def take(self) -> Connection:
        """An idle connection, or the next one that is given back, first come, first served.

        Raises Unavailable, Busy.
        """
        deadline = self._request.deadline or time.monotonic() + self.timeout - SLACK
        with self._lock:
            if self._away is not None:
                raise errors.Unavailable()
            while self._idle:
                conn = self._idle.pop()
                if conn.usable:
                    conn.deadline = deadline
                    return conn
                self._drop(conn)
            turn = Turn()
            self._turns.append(turn)
            self._work.notify()
        while not turn.wait(min(PATIENCE, deadline - time.monotonic())) and time.monotonic() < deadline:
            with self._lock:
                if self._lost_at is not None and time.monotonic() - self._lost_at > PATIENCE:
                    self._set_away("connections are lost, and no new one comes")
        with self._lock:
            if turn.conn is not None:
                turn.conn.deadline = deadline
                return turn.conn
            if self._away is not None:
                raise errors.Unavailable()
            if turn in self._turns:
                self._turns.remove(turn)
            if self._dialing_since is not None and time.monotonic() - self._dialing_since > 1:
                self._set_away("the server does not answer")
                raise errors.Unavailable()
        raise errors.Busy("All connections of this instance are in use.")

    def give(self, conn: Connection) -> None:
        """To whoever waits longest, or back into the pool; away with it if it broke."""
        reusable = conn.reusable
        with self._lock:
            if reusable and self._away is None and not self._closed:
                self._hand_on(conn)
            else:
                self._drop(conn)
                self._work.notify()

    def judge(self, conn: Connection, exc: psycopg2.Error) -> None:
        """Silence, and a server that only reads, mean that the database is away.

        One lost connection means that it may be: the idle ones are as old, and behind a pooler they seem well though
        their server is dead, so nobody gets one of them before a new one shows that it is there.
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
                self._work.notify()

    def _drop(self, conn: Connection) -> None:
        self._open -= 1
        conn.close()

    def _set_away(self, why: str) -> None:
        """With the lock held: refuse everybody until the dialer gets through."""
        if self._away is None:
            log.error("database-away", extra={"fields": {"reason": why}})
        self._away = why
        while self._idle:
            self._drop(self._idle.pop())
        self._release_turns()
        self._work.notify()

    def _hand_on(self, conn: Connection) -> None:
        if self._turns:
            self._turns.popleft().come(conn)
        else:
            self._idle.append(conn)

    def _release_turns(self) -> None:
        while self._turns:
            self._turns.popleft().come(None)

    def _dial_wanted(self) -> bool:
        more = bool(self._turns) and self._open < self._max
        doubt = self._away is not None or self._lost_at is not None
        return self._closed or doubt or self._open < self._min or more

    def _dial_for_all(self) -> None:
        while True:
            with self._lock:
                self._work.wait_for(self._dial_wanted)
                if self._closed:
                    return
                self._dialing_since = time.monotonic()
            conn, why = None, ""
            try:
                conn = self.dial(self.application_name)
            except Exception as exc:
                why = mask(str(exc).strip()) or type(exc).__name__
            with self._lock:
                self._dialing_since = None
                if conn is None:
                    # Else those that are open will tell: too many clients is not "away".
                    if not self._open or self._lost_at is not None:
                        self._set_away(why)
                elif self._closed:
                    conn.close()
                else:
                    if self._away is not None:
                        log.warning("database-back")
                    self._away = self._lost_at = None
                    self._open += 1
                    self._hand_on(conn)
            if conn is None:
                time.sleep(PROBE_PERIOD * random.uniform(0.8, 1.2))


class Request(threading.local):
    """What a thread is at: its deadline, its open transaction, and whether it may have committed something."""

    deadline: float | None = None
    transaction: Connection | None = None
    untouched = True


class Turn:
    """A request that waits for a connection; its turn comes with one, or with none when nobody gets any."""

    __slots__ = ("_come", "conn")

    def __init__(self) -> None:
        self.conn: Connection | None = None
        self._come = threading.Lock()
        self._come.acquire()

    def wait(self, seconds: float) -> bool:
        return self._come.acquire(timeout=max(0.0, seconds))

    def come(self, conn: Connection | None) -> None:
        self.conn = conn
        self._come.release()


class Lease:
    """`with` this: a connection of the pool for a while. A class, since a generator takes three times as long."""

    __slots__ = ("_conn", "_database", "_joined")

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> Connection:
        self._joined = self._database._request.transaction
        self._conn = self._joined or self._database.take()
        return self._conn

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(exc, psycopg2.Error):
            self._database.judge(self._conn, exc)
        if self._joined is None:
            self._database.give(self._conn)
        if isinstance(exc, psycopg2.Error):
            raise translate(exc) from exc


class Dedicated:
    """One background thread's connection: dialled when first needed, and again after a failure."""

    def __init__(self, database: Database, application_name: str) -> None:
        self._database, self._name = database, application_name
        self._conn: Connection | None = None

    @contextlib.contextmanager
    def connection(self, timeout: float | None = None) -> Iterator[Connection]:
        """Raises as `Database.connection`; `timeout` in seconds, the database's by default."""
        try:
            if self._conn is None or not self._conn.usable:
                self.close()
                self._conn = self._database.dial(self._name)
            self._conn.deadline = time.monotonic() + (timeout or self._database.timeout - SLACK)
            yield self._conn
        except psycopg2.Error as exc:
            # A holder's own bound may be short, and then a cut says nothing about the server.
            if self._conn is not None and (self._conn.took > SILENCE or exc.pgcode in WRONG_SERVER):
                self._database.judge(self._conn, exc)
            if not isinstance(exc, pgx.QueryCanceledError):
                self.close()
            raise translate(exc) from exc

    def close(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None
