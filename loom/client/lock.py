"""`with client.lock("deploy", ttl=30) as lock:` holds a lock, renews it, and says at once when it is lost."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType

from loom.client import clock, errors
from loom.client.coordination import Coordination
from loom.client.lease import Lease
from loom.client.values import Json

LONGEST_ASK = 10  # seconds that one request waits at most: then another instance is asked, if this one hangs


class Lock(contextlib.ContextDecorator):
    """A lock, held from `acquire` to `release`, or for a `with` block, or for each call of the function it decorates.

    It is renewed at a third of its TTL. When it is lost, or may be because no server answers, `lost` is true at once,
    `on_lost` is called (from another thread), and `ensure` raises LockLost, as does the end of the block. The TTL
    counts from when the request was sent. A lock that was lost is not renewed. `fencing_token` fences writes.
    """

    def __init__(
        self,
        client: Coordination,
        name: str,
        ttl: int = 30,
        *,
        wait: float = 0.0,
        owner: str | None = None,
        metadata: Json | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> None:
        """`ttl`: seconds, from 1; `wait`: seconds until LockHeld is raised; `owner`: unique to this holder."""
        self.lock_name, self.owner, self.fencing_token = name, owner or str(uuid.uuid4()), 0
        self._client, self._ttl, self._wait, self._metadata, self._on_lost = client, ttl, wait, metadata, on_lost
        self._own_owner = owner
        self._done = threading.Event()
        self._lease = Lease(f"lock {name}")
        self._refused = False
        self._renewer: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Whether it is unsure that the lock is still held. Also true before it is acquired."""
        return self._lease.lost

    @property
    def left(self) -> float:
        """Seconds for which the lock is certainly held, without a further renewal."""
        return self._lease.left

    def ensure(self) -> None:
        """Raises LockLost unless the lock is certainly held now."""
        if self.lost:
            raise self._error()

    def acquire(self, wait: float | None = None, stop: threading.Event | None = None) -> Lock:
        """Waits its turn. Raises LockHeld after `wait` seconds (by default those of the constructor), or once `stop`
        is set; Unreachable or Unavailable if no server answers."""
        if self._renewer is not None:
            raise RuntimeError(f"lock {self.lock_name} is already acquired")
        deadline = time.monotonic() + (self._wait if wait is None else wait)
        stop = stop or threading.Event()
        while True:
            left = deadline - time.monotonic()
            ask = min(LONGEST_ASK, math.ceil(left)) if left > 0 else 0
            started = time.monotonic()
            try:
                grant, sent = self._client.try_acquire(
                    self.lock_name, self.owner, self._ttl, ask, self._metadata, stop=stop
                )
            except (errors.LockHeld, errors.Unavailable, errors.Unreachable) as exc:
                if time.monotonic() >= deadline or stop.is_set():
                    raise
                if time.monotonic() - started < ask - 0.5:  # it did not wait: the instance drains, or too many wait
                    stop.wait(getattr(exc, "retry_after", None) or 1.0)
                continue
            if self._hold(grant.fencing_token, sent):
                return self

    def _hold(self, token: int, sent: float) -> bool:
        """Begin to renew the grant. False if it ended while the answer was on its way."""
        self.fencing_token, self._refused = token, False
        if clock.now() - sent > self._ttl / 3:  # it has waited long for its turn
            try:
                sent = self._client.send_renewal(self.lock_name, token, self._ttl, self._client.transport.timeout)
            except errors.LockLost:
                return False
        self._done = done = threading.Event()
        self._lease = Lease(f"lock {self.lock_name}", self._on_lost)
        self._lease.extend(sent, self._ttl)
        self._renewer = threading.Thread(
            target=self._renew_until, args=(done,), name=f"renew {self.lock_name}", daemon=True
        )
        self._renewer.start()
        threading.Thread(
            target=self._watch, args=(self._lease, done), name=f"watch {self.lock_name}", daemon=True
        ).start()
        return True

    def release(self) -> None:
        """Give the lock back, or leave it to expire if no server answers. Raises LockLost if it was lost before."""
        if self._renewer is None:
            return
        self._done.set()
        self._renewer.join()
        self._renewer = None
        lost = self.lost
        if not self._refused:
            # Also if it may be lost: this token can end no other grant.
            try:
                self._client.release_lock(self.lock_name, self.fencing_token, timeout=max(1.0, self._lease.left))
            except errors.LockLost as exc:
                self._lease.lose(f"it was {exc.members.get('ended_how') or 'never granted'}")
                lost = True
            except (errors.Problem, errors.Unreachable):
                pass  # the grant expires by itself
        if lost:
            self._lease.check()
            raise self._error()
        self._lease = Lease(f"lock {self.lock_name}")

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.release()
        except errors.LockLost:
            if exc is None:
                raise

    def _recreate_cm(self) -> Lock:
        """A decorated function acquires the lock for each of its calls, also when they run at the same time."""
        return Lock(
            self._client,
            self.lock_name,
            self._ttl,
            wait=self._wait,
            owner=self._own_owner,
            metadata=self._metadata,
            on_lost=self._on_lost,
        )

    def _error(self) -> errors.LockLost:
        members = {"lock_name": self.lock_name, "fencing_token": self.fencing_token}
        return errors.LockLost(
            f"lock {self.lock_name} is lost: {self._lease.why or 'not held'}",
            title=errors.LockLost.__doc__ or "",
            members=members,
        )

    def _renew_until(self, done: threading.Event) -> None:
        lease, pause = self._lease, self._lease.left - self._ttl * 2 / 3
        while not done.wait(max(0.0, pause) * random.uniform(0.9, 1.0)) and not lease.check():
            try:
                bound = max(0.1, min(self._ttl / 3, lease.left))
                lease.extend(self._client.send_renewal(self.lock_name, self.fencing_token, self._ttl, bound), self._ttl)
            except errors.LockLost as exc:
                self._refused = True
                lease.lose(f"it was {exc.members.get('ended_how') or 'never granted'}")
                return
            except Exception:  # also what urllib3 or the system may raise: the watch ends it in time
                pause = min(1.0, self._ttl / 10)
            else:
                pause = lease.left - self._ttl * 2 / 3

    def _watch(self, lease: Lease, done: threading.Event) -> None:
        """A thread of its own: a renewal may hang for longer than its bound, for example while it resolves a name."""
        while not done.wait(min(1.0, lease.left)):
            if lease.check():
                return
