"""A draining instance refuses the requests to which it has just granted a lock."""

from __future__ import annotations

from typing import Any

import msgspec

from app import app as app
from loom import instances, locks

acquire = locks.acquire


def acquire_and_forget(*args: Any, **more: Any) -> locks.Attempt:
    attempt = acquire(*args, **more)
    if attempt.granted and instances.current is not None and instances.current.draining:
        return msgspec.structs.replace(attempt, outcome="held")
    return attempt


locks.acquire = acquire_and_forget
