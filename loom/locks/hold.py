"""`with locks.hold("my-operation", ttl=30) as lock:` holds a lock, renews it, and reports at once when it is lost."""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

from loom import db, errors
from loom.locks import grants

log = logging.getLogger("loom.locks")

PRINCIPAL = "system:hold"  # which no key has: over HTTP, nobody renews or releases what a program holds
POLL_PERIOD = 0.1  # seconds between two attempts while it waits; its place in the queue lasts 2 s

# A clock that keeps counting while the machine sleeps: a suspended holder must notice that its time has run out.
_clock: Callable[[], float] = (
    (lambda: time.clock_gettime(time.CLOCK_BOOTTIME)) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)


class Hold:
    """A lock held by this process, renewed at a third of its TTL until the block ends or the lock is lost.

    `fencing_token` fences writes (`locks.check`). When the lock is lost, or may be lost because the database does not
    answer, `lost` becomes true at once and `on_lost` is called (from another thread). From then on `ensure()` raises
    LockLost, and so does the end of the block. The TTL is counted from the moment at which the request was sent.
    """

    def __init__(
        self,
        name: str,
        ttl: float,
        *,
        wait: float = 0.0,
        owner: str | None = None,
        instance_id: str | None = None,
        metadata: dict[str, Any] | None = None,
        on_lost: Callable[[], object] | None = None,
        database: db.Database | None = None,
    ) -> None:
        """`ttl` and `wait` in seconds. Entering raises LockHeld if the lock cannot be acquired within `wait`."""
        self.name, self.owner, self.fencing_token = name, owner or str(uuid.uuid4()), 0
        self._ttl, self._wait, self._on_lost = ttl, wait, on_lost
        self._instance_id, self._metadata = instance_id, metadata
        self._connection = (database or db.default()).dedicated("hold")
        self._trusted_until = 0.0
        self._done = threading.Event()
        self._lost = threading.Event()
        self._report_lock = threading.Lock()
        self._renewer = threading.Thread(target=self._renew_until_done, name=f"hold {name}", daemon=True)

    @property
    def lost(self) -> bool:
        return self._lost.is_set() or _clock() >= self._trusted_until

    def ensure(self) -> None:
        """Raises LockLost unless we can be sure that we still hold the lock."""
        if self.lost:
            raise errors.LockLost(lock_name=self.name, fencing_token=self.fencing_token)

    def __enter__(self) -> Hold:
        try:
            return self._acquire(time.monotonic() + self._wait)
        except BaseException:
            self._connection.close()
            raise

    def _acquire(self, deadline: float) -> Hold:
        while True:
            sent = _clock()
            with self._connection.use() as conn:
                attempt = grants.acquire(
                    conn,
                    self.name,
                    self.owner,
                    timedelta(seconds=self._ttl),
                    instance_id=self._instance_id,
                    metadata=self._metadata,
                    wait=self._wait > 0,
                    principal=PRINCIPAL,
                )
            if attempt.granted and attempt.grant is not None:
                self.fencing_token, self._trusted_until = attempt.grant.fencing_token, sent + self._ttl
                self._renewer.start()
                threading.Thread(target=self._watch, name=f"watch {self.name}", daemon=True).start()
                return self
            if time.monotonic() >= deadline:
                raise errors.LockHeld(lock_name=self.name, holder=attempt.grant, waiting=attempt.waiting)
            time.sleep(min(POLL_PERIOD, max(0.0, deadline - time.monotonic())))

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        self._renewer.join()
        was_lost = self.lost
        if not was_lost:
            try:
                with self._connection.use() as conn:
                    grants.release(conn, self.name, self.fencing_token, principal=PRINCIPAL)
            except errors.LockLost:
                was_lost = True
            except errors.Unavailable:
                pass  # the grant expires by itself
        self._connection.close()
        if was_lost and exc is None:
            raise errors.LockLost(lock_name=self.name, fencing_token=self.fencing_token)

    def _renew_until_done(self) -> None:
        pause = self._ttl / 3
        while not self._done.wait(pause * random.uniform(0.9, 1.0)) and not self.lost:
            sent = _clock()
            try:
                with self._connection.use(max(0.1, min(4.0, self._trusted_until - sent))) as conn:
                    ttl = timedelta(seconds=self._ttl)
                    grants.renew(conn, self.name, self.fencing_token, ttl, principal=PRINCIPAL)
            except errors.LockLost:
                self._report_lost()
                return
            except Exception:
                pause = min(1.0, self._ttl / 10)
            else:
                self._trusted_until = sent + self._ttl
                pause = self._ttl / 3

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, max(0.0, self._trusted_until - _clock()))):
            if self.lost:
                self._report_lost()
                return

    def _report_lost(self) -> None:
        with self._report_lock:
            if self._lost.is_set():
                return
            self._lost.set()
        log.warning("lock-lost", extra={"fields": {"lock_name": self.name, "fencing_token": self.fencing_token}})
        if self._on_lost is not None:
            self._on_lost()


hold = Hold
