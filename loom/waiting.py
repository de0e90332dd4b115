"""Requests that wait: while there are any, one poll per worker serves all that wait for the same kind of thing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from loom import db, errors

log = logging.getLogger("loom.waiting")


class Waiter:
    """A request that waits until it gets a result, or until the database cannot be reached."""

    def __init__(self, client_gone: Callable[[], bool]) -> None:
        """`client_gone` tells whether the client of the request has hung up."""
        self.client_gone = client_gone
        self.result: Any = None
        self.error: errors.Error | None = None
        self.woken = threading.Event()


W = TypeVar("W", bound=Waiter)


class WaitLimit:
    """Counts the waiting requests of one worker: at most `most`, so that threads are left for other requests.

    No request may wait while the worker is draining: those that wait are answered, and their clients ask another
    instance early enough to keep their places in the queue.
    """

    def __init__(self, most: int, draining: Callable[[], bool]) -> None:
        self.most, self.draining = most, draining
        self.lock = threading.Lock()
        self.count = 0


class Poller(Generic[W]):
    """The requests that wait for one kind of thing, at most `most`, and the thread that polls for them."""

    name: str  # of its thread and its connection
    period: float  # seconds between two polls

    def __init__(self, limit: WaitLimit, most: int | None = None) -> None:
        self._limit, self._most = limit, limit.most if most is None else most
        self._waiters: set[W] = set()
        self._change = threading.Condition(limit.lock)
        self._poll_now = threading.Event()
        self._started = False

    def poll(self, conn: db.Connection, waiters: list[W]) -> None:
        """Looks up all `waiters` in the database, and calls `wake` for those that have a result."""
        raise NotImplementedError

    @property
    def full(self) -> bool:
        return len(self._waiters) >= self._most or self._limit.count >= self._limit.most or self._limit.draining()

    def wait(self, waiter: W, seconds: float) -> Any:
        """The waiter's result.

        None if there is no result within `seconds`, its client hangs up, too many wait, or the worker is draining.
        Raises Unavailable when the database becomes unreachable in the meantime.
        """
        with self._change:
            if self.full:
                return None
            self._waiters.add(waiter)
            self._limit.count += 1
            if not self._started:
                self._started = True
                threading.Thread(target=self._poll_for_all, name=self.name, daemon=True).start()
            self._change.notify()
        try:
            waiter.woken.wait(seconds)
        finally:
            with self._change:
                self._waiters.discard(waiter)
                self._limit.count -= 1
        if waiter.error is not None:
            raise waiter.error
        return waiter.result

    def wake(self, which: Callable[[W], bool], result: Any) -> None:
        """Wakes the waiters for which `which` is true, with this result."""
        with self._change:
            for waiter in filter(which, self._waiters):
                waiter.result = result
                waiter.woken.set()

    def poll_soon(self, which: Callable[[W], bool]) -> None:
        """Polls at once if a waiter for which `which` is true is there: it may have a result."""
        with self._change:
            if any(map(which, self._waiters)):
                self._poll_now.set()

    def _poll_for_all(self) -> None:
        connection = db.default().dedicated(self.name)
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._waiters))
                # A woken waiter may still be in the set; a poll for it would take a new place in the queue.
                waiters = [w for w in self._waiters if not w.woken.is_set()]
            started = time.monotonic()
            for waiter in [w for w in waiters if w.client_gone() or self._limit.draining()]:
                waiters.remove(waiter)
                waiter.woken.set()
            try:
                if waiters:
                    with connection.use() as conn:
                        self.poll(conn, waiters)
            except Exception as exc:
                if not isinstance(exc, errors.Unavailable):
                    log.exception("poll-failed", extra={"fields": {"poller": self.name}})
                for waiter in [w for w in waiters if w.result is None]:
                    waiter.error = exc if isinstance(exc, errors.Error) else errors.Unavailable()
                    waiter.woken.set()
            self._poll_now.wait(max(0.0, self.period - (time.monotonic() - started)))
            self._poll_now.clear()
