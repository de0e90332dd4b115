"""HTTP to any of several servers: bounded in time as a whole, repeated where that is safe."""

from __future__ import annotations

import json
import os
import random
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

import urllib3

from loom.client import clock, errors

CONNECT_SECONDS = 2.0  # as nginx has for an instance
SLOWEST_RETRY = 2.0  # seconds between two attempts at most, unless Retry-After says otherwise
NOT_SENT = (urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.NewConnectionError)
TRY_AGAIN = {408, 429, 502, 503, 504}
NOT_DONE = {408, 429}  # of these: certainly not done


@dataclass(frozen=True)
class Answer:
    """An answer. `sent`: when the attempt that was answered was sent. `retried`: an earlier one may have been done."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent: float
    retried: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None

    @property
    def retry_after(self) -> float | None:
        text = self.headers.get("Retry-After", "")
        return float(text) if text.isdigit() else None

    def error(self) -> errors.Problem:
        try:
            problem = self.json
        except ValueError:
            problem = None
        return errors.of_answer(
            self.status,
            problem,
            retry_after=self.retry_after,
            request_id=self.headers.get("X-Request-ID"),
            retried=self.retried,
        )


class Transport:
    """Kept connections to the servers. Any thread may call it, and a forked process begins with new connections.

    A call goes to the server that answered last. If that cannot be reached, does not answer, or answers 502, 503 or
    504, the call goes on to the next. Every call may be repeated: a POST that the server would do twice carries an
    Idempotency-Key, the same in each attempt.
    """

    def __init__(
        self, servers: Sequence[str], headers: Mapping[str, str], timeout: float, attempt_timeout: float, **options: Any
    ) -> None:
        """`options` are urllib3's, such as `ca_certs`."""
        self.servers = [server.rstrip("/") for server in servers]
        for server in self.servers:
            if urlsplit(server).scheme not in ("http", "https") or not urlsplit(server).hostname:
                raise ValueError(f"{server!r} is not the URL of a server, such as http://localhost:8080")
        if not self.servers:
            raise ValueError("no server is given")
        self.timeout, self.attempt_timeout = timeout, attempt_timeout
        self._headers, self._options = dict(headers), options
        self._current = 0
        self._pid, self._http = 0, urllib3.PoolManager()

    def close(self) -> None:
        self._http.clear()

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
        timeout: float | None = None,
        wait: float = 0.0,
        stop: threading.Event | None = None,
    ) -> Answer:
        """Send until there is an answer that another attempt would not change.

        `key`: the Idempotency-Key; `timeout`: seconds for all attempts, besides the `wait` that the request asks for;
        `stop`: once it is set, no further attempt is made.
        Raises Unreachable. Errors that are answered are returned.
        """
        given = {name: value for name, value in (query or {}).items() if value is not None}
        target = f"{path}?{urlencode(given, doseq=True)}" if given else path
        sent_headers = {"X-Request-ID": str(uuid.uuid4()), **self._headers, **(headers or {})}
        if key is not None:
            sent_headers["Idempotency-Key"] = key
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout) + wait
        maybe_done, failures, tries = False, list[str](), 0
        while True:
            server, sent, answer, pause = self._current, clock.now(), None, 0.0
            left = deadline - time.monotonic()
            try:
                answer = self._attempt(server, method, target, body, sent_headers, left, wait, sent, maybe_done)
            except (urllib3.exceptions.HTTPError, OSError) as exc:
                maybe_done = maybe_done or not isinstance(exc, NOT_SENT)
                failures.append(f"{self.servers[server]}: {_cause(exc)}")
            else:
                if not _try_again(answer):
                    return answer
                maybe_done = maybe_done or answer.status not in NOT_DONE
                pause = answer.retry_after or 0.0
                failures.append(f"{self.servers[server]}: status {answer.status}")
            self._move_on(server)
            tries += 1
            if tries % len(self.servers) == 0:  # none of them answered: slow down
                pause = max(pause, min(SLOWEST_RETRY, 0.05 * 2 ** (tries // len(self.servers))))
            pause *= random.uniform(1.0, 1.25)
            if time.monotonic() + pause >= deadline or (stop is not None and stop.is_set()):
                if answer is not None:
                    return answer
                raise errors.Unreachable(f"{method} {path}: {'; '.join(dict.fromkeys(failures[-5:]))}")
            (stop or threading.Event()).wait(pause)

    def _attempt(
        self,
        server: int,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        left: float,
        wait: float,
        sent: float,
        maybe_done: bool,
    ) -> Answer:
        bound = min(max(left, 0.05), self.attempt_timeout + wait)
        deadline = time.monotonic() + bound
        response = self._pool().request(
            method,
            self.servers[server] + target,
            body=body,
            headers=headers,
            redirect=False,
            retries=False,
            preload_content=False,
            timeout=urllib3.Timeout(connect=min(CONNECT_SECONDS, bound), read=bound),
        )
        content = bytearray()
        while chunk := response.read1(2**16):
            content += chunk
            sock = getattr(response.connection, "sock", None)
            if sock is not None:  # its time-out is for one read, not for all
                sock.settimeout(max(0.001, deadline - time.monotonic()))
        response.release_conn()
        return Answer(response.status, response.headers, bytes(content), sent, maybe_done)

    def _pool(self) -> urllib3.PoolManager:
        if self._pid != os.getpid():
            self._http = urllib3.PoolManager(num_pools=len(self.servers), maxsize=64, **self._options)
            self._pid = os.getpid()
        return self._http

    def _move_on(self, server: int) -> None:
        if self._current == server:  # else another thread has done it already
            self._current = (server + 1) % len(self.servers)


def _try_again(answer: Answer) -> bool:
    if answer.status == 409 and b"/problems/in-progress" in answer.body:
        return True
    return answer.status in TRY_AGAIN


def _cause(exc: Exception) -> str:
    cause = getattr(exc, "reason", None)
    return str(cause if isinstance(cause, Exception) else exc) or type(exc).__name__
