"""Shared by two planted faults: a poll that grants the locks itself, as an earlier one did."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from loom import db, instances, locks
from loom.http import parse
from loom.locks.queue import LockPoller, LockWaiter
from loom.routes import locks as routes


class WaiterForGrant(LockWaiter):
    """Knows what it asks for, so that the poll can ask for it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        body = parse.body(routes.AcquireLock)
        self.ttl, self.metadata = timedelta(seconds=body.ttl_seconds), body.metadata


def grant(poller: LockPoller, conn: db.Connection, waiters: list[WaiterForGrant]) -> list[locks.Grant]:
    """Grants what is free to those who are first, wakes them, and returns the grants for which nobody was there."""
    rows = db.rows(
        conn,
        "SELECT * FROM poll_waiters(%(names)s, %(owners)s)",
        names=[waiter.name for waiter in waiters],
        owners=[waiter.waits_as for waiter in waiters],
    )
    nobody_there = []
    asking = {(waiter.name, waiter.waits_as): waiter for waiter in waiters}
    for name, owner in asking.keys() & {(row["lock_name"], row["owner"]) for row in rows}:
        first = asking[name, owner]
        attempt = locks.acquire(
            conn,
            name,
            first.owner,
            first.ttl,
            instance_id=instances.own_id(),
            metadata=first.metadata,
            wait=False,
            principal="local",
        )
        if attempt.grant is None or not attempt.granted:
            continue
        poller.wake(
            lambda waiter, made=attempt.grant: (waiter.name, waiter.owner) == (made.lock_name, made.owner), True
        )
        if not any((waiter.name, waiter.waits_as) == (name, owner) for waiter in list(poller._waiters)):
            nobody_there.append(attempt.grant)
    return nobody_there


routes.LockWaiter = WaiterForGrant
