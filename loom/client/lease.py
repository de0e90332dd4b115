"""What a holder may believe of its grant or claim."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from loom.client import clock

log = logging.getLogger("loom.client")


class Lease:
    """A grant or claim that is trusted until a moment, and lost once: when that is over, or when Loom says so.

    The moment counts from when the request was sent, so that it is never later than the end that the server has set.
    What was lost stays lost, also if a late answer says that it was extended.
    """

    def __init__(self, what: str, on_lost: Callable[[], object] | None = None) -> None:
        """`on_lost` is called once, from the thread that finds out."""
        self._what, self._on_lost = what, on_lost
        self._trusted_until = 0.0
        self._lost = threading.Event()
        self._lock = threading.Lock()
        self.why = ""

    def extend(self, sent: float, seconds: float) -> None:
        """It was granted or extended for so long, by a request that was sent then."""
        if self._trusted_until and self.check():
            return
        self._trusted_until = sent + seconds

    @property
    def left(self) -> float:
        """Seconds for which it may still be trusted."""
        return 0.0 if self._lost.is_set() else max(0.0, self._trusted_until - clock.now())

    @property
    def lost(self) -> bool:
        return self._lost.is_set() or clock.now() >= self._trusted_until

    def check(self) -> bool:
        """Whether it is lost; if its time is over, that is reported now."""
        if self.lost:
            self.lose("it could not be extended in time")
        return self.lost

    def lose(self, why: str) -> None:
        """Report that it is lost; the first report counts."""
        with self._lock:
            if self._lost.is_set():
                return
            self.why = why
            self._lost.set()
        log.warning("%s is lost: %s", self._what, why)
        if self._on_lost is not None:
            try:
                self._on_lost()
            except Exception:
                log.exception("on_lost of %s failed", self._what)
