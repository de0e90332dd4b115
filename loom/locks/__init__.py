"""Distributed locks with fencing tokens: rows of distributed_locks, decided by PostgreSQL on its own clock."""

from loom.locks.grants import (
    Attempt,
    Grant,
    acquire,
    check,
    force_release,
    get,
    held,
    history,
    release,
    renew,
    waiters,
    waiting,
)
from loom.locks.hold import Hold, hold
