"""Load from a fixed number of threads, with a record of every answer: what users see of a fault."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.client import Answer, Client


@dataclass(frozen=True)
class Call:
    """One request, sent at `at` (monotonic). Without a whole answer, `status` is 0 and `said` the error."""

    at: float
    seconds: float
    what: str
    status: int
    said: str

    @property
    def ended(self) -> float:
        return self.at + self.seconds


class Caller:
    """Sends a job's requests over one connection, to each server in turn after a failure, and records them."""

    def __init__(self, servers: Sequence[str | int], first: int, calls: list[Call]) -> None:
        self._clients = [Client(server) for server in (*servers[first:], *servers[:first])]
        self._calls = calls

    def __call__(self, method: str, path: str, body: Any = None) -> Answer | None:
        """Return the answer, or None when there was none."""
        sent = time.monotonic()
        try:
            answer = self._clients[0].request(method, path, body)
        except (OSError, http.client.HTTPException) as exc:
            self._clients.append(self._clients.pop(0))
            self._calls.append(Call(sent, time.monotonic() - sent, f"{method} {path}", 0, repr(exc)))
            return None
        said = answer.body[:200].decode(errors="replace")
        self._calls.append(Call(sent, time.monotonic() - sent, f"{method} {path}", answer.status, said))
        return answer

    def close(self) -> None:
        for client in self._clients:
            client.close()


Job = Callable[[Caller], object]


class Load:
    """Runs each of `jobs` on a thread of its own, repeatedly until the block ends; `calls` are the answers."""

    def __init__(self, servers: Sequence[str | int], jobs: Sequence[Job], pause: float = 0.02) -> None:
        """`servers`: URLs or ports, among which the threads are distributed; `pause`: seconds between two runs."""
        self.calls: list[Call] = []
        self._pause, self._over, self._faults = pause, threading.Event(), list[BaseException]()
        self._threads = [
            threading.Thread(target=self._run, args=(job, Caller(servers, i % len(servers), self.calls)))
            for i, job in enumerate(jobs)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Wait for the outstanding answers. Raises what a job raised."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        for fault in self._faults:
            raise fault

    def _run(self, job: Job, caller: Caller) -> None:
        try:
            while not self._over.is_set():
                job(caller)
                self._over.wait(self._pause)
        except BaseException as exc:
            self._faults.append(exc)
        finally:
            caller.close()

    def between(self, start: float, end: float = float("inf")) -> list[Call]:
        """Return the calls sent from `start` to `end`."""
        return [call for call in self.calls if start <= call.at <= end]

    def statuses(self) -> Counter[int]:
        return Counter(call.status for call in self.calls)


def get(path: str) -> Job:
    """A job that reads."""
    return lambda call: call("GET", path)


def use_lock(name: str, ttl_seconds: int = 30) -> Job:
    """A job that writes: acquires a lock, renews and releases it."""

    def job(call: Caller) -> None:
        taken = call("POST", f"/api/v1/locks/{name}", {"ttl_seconds": ttl_seconds})
        if taken is None or taken.status != 201:
            return
        token = taken.json["fencing_token"]
        call("PUT", f"/api/v1/locks/{name}", {"fencing_token": token, "ttl_seconds": ttl_seconds})
        call("DELETE", f"/api/v1/locks/{name}?fencing_token={token}")

    return job
