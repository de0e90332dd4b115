"""Requests that wait: one poll a worker serves all who wait for the same kind of thing, and only while someone does."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from loom import db, errors

log = logging.getLogger("loom.waiting")


class Waiter:
    """A request that waits: it wakes with what it is told, or when the database has gone away."""

    def __init__(self, gone: Callable[[], bool]) -> None:
        """`gone`: whether its client has hung up."""
        self.gone = gone
        self.told: Any = None
        self.error: errors.Error | None = None
        self.woken = threading.Event()


W = TypeVar("W", bound=Waiter)


class Room:
    """The waiters of one worker, at `most` so many: a further one must not eat the threads that others need.

    None while it drains: its last waiters go to another instance in time to keep their places there.
    """

    def __init__(self, most: int, draining: Callable[[], bool]) -> None:
        self.most, self.draining = most, draining
        self.lock = threading.Lock()
        self.inside = 0


class Line(Generic[W]):
    """Those in the room who wait for one kind of thing, at `most` so many."""

    name: str  # of its connection
    period: float  # seconds between two polls

    def __init__(self, room: Room, most: int | None = None) -> None:
        self._room, self._most = room, room.most if most is None else most
        self._waiters: set[W] = set()
        self._change = threading.Condition(room.lock)
        self._nudged = threading.Event()
        self._started = False

    def poll(self, conn: db.Connection, waiters: list[W]) -> None:
        """Looks for all of them, and `tell`s those for whom there is something."""
        raise NotImplementedError

    @property
    def full(self) -> bool:
        return len(self._waiters) >= self._most or self._room.inside >= self._room.most or self._room.draining()

    def wait(self, waiter: W, seconds: float) -> Any:
        """What the waiter is told, or None: nothing within `seconds`, or its client has gone, or no room, or we drain.

        Raises Unavailable when the database goes away meanwhile.
        """
        with self._change:
            if self.full:
                return None
            self._waiters.add(waiter)
            self._room.inside += 1
            if not self._started:
                self._started = True
                threading.Thread(target=self._poll_for_all, name=self.name, daemon=True).start()
            self._change.notify()
        try:
            waiter.woken.wait(seconds)
        finally:
            with self._change:
                self._waiters.discard(waiter)
                self._room.inside -= 1
        if waiter.error is not None:
            raise waiter.error
        return waiter.told

    def tell(self, whom: Callable[[W], bool], what: Any) -> None:
        """Wakes those for whom it is, unless they have left meanwhile."""
        with self._change:
            for waiter in filter(whom, self._waiters):
                waiter.told = what
                waiter.woken.set()

    def nudge(self, whom: Callable[[W], bool]) -> None:
        """There may be something for them: poll now, if one of them waits."""
        with self._change:
            if any(map(whom, self._waiters)):
                self._nudged.set()

    def _poll_for_all(self) -> None:
        connection = db.default().dedicated(self.name)
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._waiters))
                # Whoever has been told is perhaps not gone yet, and would take a new place, for nobody.
                waiters = [w for w in self._waiters if not w.woken.is_set()]
            started = time.monotonic()
            for waiter in [w for w in waiters if w.gone() or self._room.draining()]:
                waiters.remove(waiter)
                waiter.woken.set()
            try:
                if waiters:
                    with connection.connection() as conn:
                        self.poll(conn, waiters)
            except Exception as exc:
                if not isinstance(exc, errors.Unavailable):
                    log.exception("poll-failed", extra={"fields": {"line": self.name}})
                for waiter in [w for w in waiters if w.told is None]:
                    waiter.error = exc if isinstance(exc, errors.Error) else errors.Unavailable()
                    waiter.woken.set()
            self._nudged.wait(max(0.0, self.period - (time.monotonic() - started)))
            self._nudged.clear()
