"""A poll releases a grant whose waiter has gone, although the request has acquired the lock itself meanwhile."""

from __future__ import annotations

from granting import WaiterForGrant, grant

from app import app as app
from loom import db, locks
from loom.locks.queue import LockPoller


def poll(poller: LockPoller, conn: db.Connection, waiters: list[WaiterForGrant]) -> None:
    for made in grant(poller, conn, waiters):
        now = locks.get(conn, made.lock_name)
        if now is not None and now.heartbeat_at == made.heartbeat_at:
            locks.release(conn, made.lock_name, made.fencing_token)


LockPoller.poll = poll
