"""Adds its numbers to a set, each by read, add, write under a lock, and stops itself at the worst moments.

python lock_set_writer.py DSN PORT SET FENCED FIRST STEP SECONDS
FENCED is 1 or 0. Prints "acknowledged N" or "refused N" for each number, FIRST, FIRST + STEP and so on.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator

from harness import Client

from loom import db, errors, locks

TTL = 1  # seconds


@contextlib.contextmanager
def over_http(client: Client, name: str) -> Iterator[int]:
    """The lock as any client holds it. Nothing is renewed."""
    path = f"/api/v1/locks/{name}"
    while (answer := client.post(path, {"ttl_seconds": TTL, "wait_seconds": 5})).status != 201:
        assert answer.status == 409, answer
    token = answer.json["fencing_token"]
    yield token
    while (answer := client.delete(f"{path}?fencing_token={token}")).status == 503:  # our write has not ended yet
        time.sleep(0.05)
    assert answer.status in (204, 409), answer


@contextlib.contextmanager
def in_python(name: str) -> Iterator[int]:
    """The lock as `locks.hold` holds it: renewed, and its loss is reported."""
    with contextlib.suppress(errors.LockLost), locks.hold(name, TTL, wait=30) as lock:
        yield lock.fencing_token


def pause(chance: float) -> None:
    """Sometimes stop this process; the test wakes it once the lock has expired."""
    if random.random() < chance:
        os.kill(os.getpid(), signal.SIGSTOP)


def add(number: int, name: str, token: int, fenced: bool) -> None:
    """Raises LockLost when the write is refused."""
    with db.connection() as conn:
        row = db.one(conn, "SELECT numbers FROM lock_set WHERE name = %(name)s", name=name)
    assert row is not None
    pause(0.3)
    with db.transaction() as conn:
        if fenced:
            locks.check(conn, name, token)
        pause(0.1)
        db.run(
            conn,
            "UPDATE lock_set SET numbers = %(numbers)s WHERE name = %(name)s",
            name=name,
            numbers=[*row["numbers"], number],
        )
    print("acknowledged", number, flush=True)


def main(dsn: str, port: str, name: str, fenced: str, first: str, step: str, seconds: str) -> None:
    random.seed(f"{name} {first}")
    database = db.Database(dsn)
    database.open()
    db.configure(database)
    client, number, end = Client(int(port)), int(first), time.monotonic() + float(seconds)
    while time.monotonic() < end:
        with over_http(client, name) if random.random() < 0.5 else in_python(name) as token:
            try:
                add(number, name, token, fenced == "1")
            except errors.LockLost:
                print("refused", number, flush=True)
        number += int(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
