"""The clock on which a holder trusts its lease."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds of a clock that keeps counting while the machine sleeps: a holder must notice that its time is over."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
