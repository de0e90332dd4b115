"""A poll grants to the waiters of the previous poll, although their requests have been answered meanwhile."""

from __future__ import annotations

from granting import WaiterForGrant, grant

from app import app as app
from loom import db
from loom.locks.queue import Queue

seen: list[WaiterForGrant] = []


def poll(queue: Queue, conn: db.Connection, waiters: list[WaiterForGrant]) -> None:
    grant(queue, conn, [*waiters, *seen])
    seen[:] = waiters


Queue.poll = poll
