"""Requests that wait for a lock: one poll a worker serves them all, and only while someone waits."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from loom import db, errors
from loom.locks.grants import Attempt, attempt, take_back

log = logging.getLogger("loom.locks")

POLL_PERIOD = 0.05  # seconds; 25 to 27 grants/s on one name with 198 waiters, 0.5 ms a poll


class Waiter:
    """A request that waits: it wakes with its grant, or when the database has gone away."""

    def __init__(
        self, name: str, owner: str, ttl: timedelta, metadata: dict[str, Any] | None, gone: Callable[[], bool]
    ) -> None:
        self.name, self.owner, self.ttl, self.gone = name, owner, ttl, gone
        self.metadata = None if metadata is None else json.dumps(metadata)
        self.granted: Attempt | None = None
        self.shared = False  # with another request of the same owner, which was told of the grant, too
        self.error: errors.Error | None = None
        self.woken = threading.Event()


class Queue:
    """The waiters of one worker, at `most` so many: a further one must not eat the threads that others need.

    None while it drains: its last waiters go to another instance in time to keep their places there.
    """

    def __init__(self, most: int, instance_id: Callable[[], str | None], draining: Callable[[], bool]) -> None:
        self._most, self._instance_id, self._draining = most, instance_id, draining
        self._waiters: set[Waiter] = set()
        self._change = threading.Condition()
        self._nudged = threading.Event()
        self._started = False

    @property
    def full(self) -> bool:
        return len(self._waiters) >= self._most or self._draining()

    def wait(self, waiter: Waiter, seconds: float) -> Attempt | None:
        """The waiter's grant, or None: not within `seconds`, or its client has gone, or we drain.

        Raises Unavailable when the database goes away meanwhile.
        """
        with self._change:
            self._waiters.add(waiter)
            if not self._started:
                self._started = True
                threading.Thread(target=self._poll_for_all, name="lock-waiters", daemon=True).start()
            self._change.notify()
        try:
            waiter.woken.wait(seconds)
        finally:
            with self._change:
                self._waiters.discard(waiter)
        if waiter.error is not None:
            raise waiter.error
        return waiter.granted

    def nudge(self, name: str) -> None:
        """This lock was released here: poll now if someone waits for it."""
        with self._change:
            if any(waiter.name == name for waiter in self._waiters):
                self._nudged.set()

    def _poll_for_all(self) -> None:
        line = db.default().dedicated("waiters")
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._waiters))
                # Whoever has its grant is perhaps not gone yet, and would take a new place, for nobody.
                waiters = [w for w in self._waiters if not w.woken.is_set()]
            started = time.monotonic()
            for waiter in [w for w in waiters if w.gone() or self._draining()]:
                waiters.remove(waiter)
                waiter.woken.set()
            try:
                self._poll(line, waiters)
            except Exception as exc:
                if not isinstance(exc, errors.Unavailable):
                    log.exception("poll-failed")
                for waiter in [w for w in waiters if w.granted is None]:
                    waiter.error = exc if isinstance(exc, errors.Error) else errors.Unavailable()
                    waiter.woken.set()
            self._nudged.wait(max(0.0, POLL_PERIOD - (time.monotonic() - started)))
            self._nudged.clear()

    def _poll(self, line: db.Dedicated, waiters: list[Waiter]) -> None:
        if not waiters:
            return
        # One owner may wait in two requests; it asks once.
        asks = list({(w.name, w.owner): w for w in waiters}.values())
        with line.connection() as conn:
            rows = db.all(
                conn,
                "SELECT * FROM poll_waiters(%(names)s, %(owners)s, %(ttls)s::interval[], %(abouts)s::jsonb[],"
                " %(instance)s::uuid)",
                names=[w.name for w in asks],
                owners=[w.owner for w in asks],
                ttls=[w.ttl for w in asks],
                abouts=[w.metadata for w in asks],
                instance=self._instance_id(),
            )
            for got in map(attempt, rows):
                assert got.grant is not None
                with self._change:
                    theirs = [w for w in self._waiters if (w.name, w.owner) == (got.grant.lock_name, got.grant.owner)]
                    for waiter in theirs:
                        waiter.granted, waiter.shared = got, len(theirs) > 1
                        waiter.woken.set()
                if not theirs:  # told otherwise while the poll was under way
                    take_back(conn, got.grant)
