"""Waits for rows and tables that other sessions keep locked: a bound of their own, and which session it is."""

from __future__ import annotations

import contextlib
import time

import psycopg2

from loom import errors
from loom.db.connection import Connection

# Who may not see other roles' sessions finds none.
OLDEST_TRANSACTION = """
    SELECT format('It had to wait for a lock. The oldest open transaction is that of session %s (%s), for %s s.',
                  pid, concat_ws(', ', NULLIF(application_name, ''), state),
                  round(extract(epoch FROM clock_timestamp() - xact_start)::numeric, 1)) AS text
      FROM pg_stat_activity
     WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start < clock_timestamp()
       AND pid IN (SELECT pid FROM pg_locks
                    WHERE granted AND locktype IN ('relation', 'advisory') AND mode <> 'AccessShareLock')
     ORDER BY xact_start LIMIT 1
"""

STUCK_SECONDS = 0.2  # after which a statement counts as one that may wait for something stuck


class LockWaits:
    """How long the requests of a worker may wait for locks.

    Requests for a row or table that somebody keeps locked must not get all connections. So the more connections are in
    use, the sooner a request is refused that has to wait for a lock; all others are not affected.
    """

    def __init__(self, connections: int, seconds: float) -> None:
        """`connections`: of the pool. `seconds`: the longest wait, while fewer than half of them are in use."""
        self._connections, self._longest = connections, seconds
        self._lent: set[Connection] = set()
        self._refused_at = self._described_at = float("-inf")  # when a wait for a lock was last given up; described
        self._blocker: str | None = None

    def lend(self, conn: Connection) -> float:
        """Counts a connection as in use, and returns for how many seconds its request may wait for a lock."""
        seconds = self._seconds()
        self._lent.add(conn)
        return seconds

    def take_back(self, conn: Connection) -> None:
        self._lent.discard(conn)

    def _seconds(self) -> float:
        if len(self._lent) * 2 < self._connections:
            return self._longest
        now = time.monotonic()
        stuck = sum(conn.began is not None and now - conn.began > STUCK_SECONDS for conn in self._lent)
        is_stuck = stuck * 2 >= self._connections or now - self._refused_at < self._longest
        return self._longest * (0.05 if is_stuck else 0.2)

    def describe_blocker(self, conn: Connection) -> str | None:
        """Which session probably keeps a lock: the one with the oldest transaction. Looked up at most once a second."""
        self._refused_at = time.monotonic()
        if self._refused_at - self._described_at > 1:
            self._described_at = self._refused_at
            with contextlib.suppress(psycopg2.Error, errors.Busy):
                found = conn.execute(OLDEST_TRANSACTION)
                self._blocker = found[0]["text"] if found else None
        return self._blocker
