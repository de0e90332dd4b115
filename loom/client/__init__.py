"""A client for programs that use Loom: `from loom.client import Client`. It imports nothing of the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from loom.client import errors
from loom.client.administration import Administration
from loom.client.base import ANY
from loom.client.coordination import Coordination
from loom.client.errors import ClaimLost, Error, LockHeld, LockLost, Problem, Unreachable
from loom.client.events import Cursor, FileCursor, follow
from loom.client.lock import Lock
from loom.client.state import State
from loom.client.task import Cancelled, Fail, GiveBack, Task
from loom.client.values import Claim, Event, FileLock, Grant, Json
from loom.client.work import Handler, Worker


class Client(Coordination, State, Administration):
    """Loom, as a program sees it. Threads may share it."""

    def lock(self, name: str, ttl: int = 30, **options: Any) -> Lock:
        """`with client.lock("deploy", ttl=30) as lock:`. Options as Lock."""
        return Lock(self, name, ttl, **options)

    def worker(self, agent: str, handler: Handler, **options: Any) -> Worker:
        """Options as Worker; `run` starts it."""
        return Worker(self, agent, handler, **options)

    def work(self, agent: str, handler: Handler, *, until: Callable[[], bool] | None = None, **options: Any) -> int:
        """Work as this agent until SIGTERM or Ctrl-C, and return how many beads were completed. Options as Worker."""
        worker = Worker(self, agent, handler, **options)
        worker.run(until)
        return worker.done

    def events(self, after: int = 0, *, store: Cursor | None = None, **options: Any) -> Iterator[Event]:
        """`for event in client.events(store=FileCursor("cursor")):`. Options as `loom.client.events.follow`."""
        return follow(self, after, store=store, **options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
