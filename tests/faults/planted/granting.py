"""What two planted faults share: a poll that grants the locks itself, as an earlier one did."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from loom import db, instances, locks
from loom.http import parse
from loom.locks.queue import Queue, Waiter
from loom.routes import locks as routes


class WaiterForGrant(Waiter):
    """Knows what it asks for, so that the poll can ask for it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        body = parse.body(routes.AcquireLock)
        self.ttl, self.metadata = timedelta(seconds=body.ttl_seconds), body.metadata


def grant(queue: Queue, conn: db.Connection, waiters: list[WaiterForGrant]) -> list[locks.Grant]:
    """Grants what is free to those who are first, wakes them, and returns the grants for which nobody was there."""
    rows = db.all(
        conn,
        "SELECT * FROM poll_waiters(%(names)s, %(owners)s)",
        names=[waiter.name for waiter in waiters],
        owners=[waiter.owner for waiter in waiters],
    )
    nobody_there = []
    asking = {(waiter.name, waiter.owner): waiter for waiter in waiters}
    for name, owner in asking.keys() & {(row["lock_name"], row["owner"]) for row in rows}:
        first = asking[name, owner]
        attempt = locks.acquire(
            conn, name, owner, first.ttl, instance_id=instances.own_id(), metadata=first.metadata, wait=False
        )
        if attempt.grant is None or not attempt.granted:
            continue
        queue.tell(lambda waiter, made=attempt.grant: (waiter.name, waiter.owner) == (made.lock_name, made.owner), True)
        if not any((waiter.name, waiter.owner) == (name, owner) for waiter in list(queue._waiters)):
            nobody_there.append(attempt.grant)
    return nobody_there


routes.Waiter = WaiterForGrant
