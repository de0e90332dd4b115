"""A request whose client has disconnected releases its owner's grant, of which the owner's next request was told."""

from __future__ import annotations

from typing import Any

from app import app as app
from loom import db, locks
from loom.locks.queue import LockPoller, LockWaiter

wait = LockPoller.wait


def wait_and_take_back(poller: LockPoller, waiter: LockWaiter, seconds: float) -> Any:
    told = wait(poller, waiter, seconds)
    if waiter.client_gone():
        with db.connection() as conn:
            held = locks.get(conn, waiter.name)
            if held is not None and held.owner == waiter.owner:
                locks.release(conn, waiter.name, held.fencing_token)
    return told


LockPoller.wait = wait_and_take_back
