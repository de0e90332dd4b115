"""A request whose client has disconnected releases its owner's grant, of which the owner's next request was told."""

from __future__ import annotations

from app import app as app
from loom import db, locks
from loom.locks.queue import LockPoller, LockWaiter

remove = LockPoller.remove


def remove_and_take_back(poller: LockPoller, waiter: LockWaiter) -> None:
    """Called when a wait ends without a result; here as if that were always a disconnected client."""
    remove(poller, waiter)
    with db.connection() as conn:
        held = locks.get(conn, waiter.name)
        if held is not None and held.owner == waiter.owner:
            locks.release(conn, waiter.name, held.fencing_token)


LockPoller.remove = remove_and_take_back
