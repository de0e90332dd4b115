"""Requests that wait: while there are any, one poll per worker serves all that wait for the same kind of thing."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from loom import db, errors

log = logging.getLogger("loom.waiting")

POLL_SHARE = 0.25  # of its time that a poller spends on polls at most, unless poll_soon() asks for more


class Waiter:
    """A request that waits for a result or an error: until its client hangs up, the worker drains, or it `ends`."""

    def __init__(self, ends: float, client_gone: Callable[[], bool]) -> None:
        """`ends`: of time.monotonic(); the poller does not look at it: the caller removes the waiter then.

        `client_gone` tells whether the client of the request has hung up.
        """
        self.ends, self.client_gone = ends, client_gone
        self.principal = ""  # whose key it is, if there is a bound for it
        self.result: Any = None
        self.error: errors.Error | None = None
        self.on_finish: Callable[[], object] = lambda: None


W = TypeVar("W", bound=Waiter)


class Poller(Generic[W]):
    """The requests of a worker that wait for one kind of thing, and the thread that polls for them.

    No request may wait while the worker is draining: those that wait are answered, and their clients ask another
    instance early enough to keep their places in the queue.
    """

    name: str  # of its thread and its connection
    period: float  # seconds between two polls

    def __init__(self, most: int, draining: Callable[[], bool]) -> None:
        """`most`: requests that may wait at the same time."""
        self.most, self._draining = most, draining
        self._waiters: set[W] = set()
        self._of_principal: Counter[str] = Counter()
        self._change = threading.Condition()
        self._poll_now = threading.Event()
        self._started = False

    def poll(self, conn: db.Connection, waiters: list[W]) -> None:
        """Looks up all `waiters` in the database, and calls `wake` for those that have a result."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._waiters)

    @property
    def full(self) -> bool:
        return self.waiting >= self.most or self._draining()

    def add(self, waiter: W) -> bool:
        """Begins to poll for the waiter, and calls its `on_finish` once, when the wait is over, unless it is removed
        before. False if too many wait: then it is not added."""
        with self._change:
            if self.full:
                return False
            self._waiters.add(waiter)
            self._of_principal[waiter.principal] += 1
            if not self._started:
                self._started = True
                threading.Thread(target=self._poll_for_all, name=self.name, daemon=True).start()
            self._change.notify()
        return True

    def remove(self, waiter: W) -> None:
        """Ends the wait without a result; does nothing if it is over."""
        with self._change:
            if waiter in self._waiters:
                self._forget(waiter)

    def waiting_of(self, principal: str) -> int:
        """The number of requests of a principal that wait."""
        return self._of_principal[principal]

    def _forget(self, waiter: W) -> None:
        self._waiters.remove(waiter)
        self._of_principal[waiter.principal] -= 1
        if not self._of_principal[waiter.principal]:
            del self._of_principal[waiter.principal]

    def wake(self, which: Callable[[W], bool], result: Any = None, error: errors.Error | None = None) -> None:
        """Ends the waits of those for which `which` is true, with this result or error."""
        with self._change:
            finished = [waiter for waiter in self._waiters if which(waiter)]
            for waiter in finished:
                self._forget(waiter)
        for waiter in finished:
            waiter.result, waiter.error = result, error
            waiter.on_finish()

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
            started = time.monotonic()
            self.wake(lambda waiter: self._draining() or waiter.client_gone())
            with self._change:
                waiters = list(self._waiters)
            try:
                if waiters:
                    with connection.use() as conn:
                        self.poll(conn, waiters)
            except Exception as exc:
                if not isinstance(exc, errors.Unavailable):
                    log.exception("poll-failed", extra={"fields": {"poller": self.name}})
                error = exc if isinstance(exc, errors.Error) else errors.Unavailable()
                polled = set(waiters)
                self.wake(polled.__contains__, error=error)
            took = time.monotonic() - started
            # A round takes `period`, or took / POLL_SHARE if that is longer. The poll and the sleep use 2 * took of it.
            # poll_soon() ends only the rest early, so that many calls of it leave the database some time, too.
            time.sleep(min(took, self.period))
            self._poll_now.wait(max(self.period - 2 * took, took / POLL_SHARE - 2 * took, 0))
            self._poll_now.clear()
