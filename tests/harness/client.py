"""HTTP clients: of an instance or nginx over a kept connection, or of the application in this process."""

from __future__ import annotations

import http.client
import json
import select
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from flask import Flask
from werkzeug.datastructures import Headers
from werkzeug.test import run_wsgi_app

from harness import contract

BOUND = 40.0  # seconds for an answer: the longest wait for a lock, and the bound for the rest
PATIENCE = 90.0  # seconds for which a Patient client retries


@dataclass(frozen=True)
class Answer:
    """An HTTP answer. Names in `headers` are case-insensitive."""

    status: int
    headers: Headers
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def repeats(self, first: Answer) -> bool:
        """Whether it is the answer `first` again, but for the id of its own request."""
        mine, others = Headers(self.headers), Headers(first.headers)
        for headers in (mine, others):
            headers.remove("X-Request-ID")
        return (self.status, self.body, mine) == (first.status, first.body, others)


class Methods:
    """One function for each HTTP method."""

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        raise NotImplementedError

    def get(self, path: str, **more: Any) -> Answer:
        return self.request("GET", path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> Answer:
        return self.request("POST", path, body, **more)

    def put(self, path: str, body: Any = None, **more: Any) -> Answer:
        return self.request("PUT", path, body, **more)

    def patch(self, path: str, body: Any = None, **more: Any) -> Answer:
        return self.request("PATCH", path, body, **more)

    def delete(self, path: str, **more: Any) -> Answer:
        return self.request("DELETE", path, **more)


def _encoded(body: Any) -> bytes:
    """Return the body to send: bytes unchanged, None as no body, anything else as JSON."""
    if body is None:
        return b""
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def readable(sock: socket.socket) -> bool:
    poll = select.poll()  # select() takes no file descriptor above 1023
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class Client(Methods):
    """One connection, opened when needed and kept. Not thread-safe. Never retries a request."""

    def __init__(self, url: str | int, timeout: float = BOUND) -> None:
        """`url`: of the server, or its port on the loopback."""
        parts = urlsplit(f"http://127.0.0.1:{url}" if isinstance(url, int) else url)
        self._conn = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Send and wait for the answer. Raises OSError or http.client.HTTPException when the connection fails."""
        sock = self._conn.sock
        if sock is not None and readable(sock):  # the server has closed it
            self._conn.close()
        try:
            self._conn.request(method, path, _encoded(body) or None, headers or {})
            response = self._conn.getresponse()
            return Answer(response.status, Headers(response.getheaders()), response.read())
        except BaseException:
            self._conn.close()
            raise

    def close(self) -> None:
        self._conn.close()


class Patient(Methods):
    """Retries each request, at each server in turn, until one answers.

    Requests must be safe to retry, for example by an Idempotency-Key. `lost` counts the failed tries by their reason.
    """

    def __init__(self, servers: Sequence[str | int], timeout: float = BOUND) -> None:
        """`timeout`: seconds until it retries."""
        self._clients = [Client(server, timeout) for server in servers]
        self.lost: Counter[str] = Counter()

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                answer = self._clients[0].request(method, path, body, headers)
            except (OSError, http.client.HTTPException) as exc:
                why = type(exc).__name__
            else:
                if answer.status not in (502, 503, 504) and not _in_progress(answer):
                    return answer
                why = str(answer.status)
            self.lost[why] += 1
            assert time.monotonic() < deadline, f"{method} {path} was not answered: {self.lost}"
            self._clients.append(self._clients.pop(0))
            time.sleep(0.05)

    def close(self) -> None:
        for client in self._clients:
            client.close()


def _in_progress(answer: Answer) -> bool:
    """Whether an earlier try of the same request is still being processed."""
    return answer.status == 409 and answer.json["type"] == "/problems/in-progress"


class AppClient(Methods):
    """Calls the application in this process, with the environ that gunicorn would make."""

    def __init__(self, app: Flask, sock: socket.socket | None = None, **environ: str) -> None:
        """`sock`: passed to the application as the client's connection; `environ`: of each request."""
        self._app, self._sock, self._environ = app, sock, environ

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        target, _, query = path.partition("?")
        raw = _encoded(body)
        environ = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": unquote_to_bytes(target).decode("latin-1"),
            "QUERY_STRING": query,
            "RAW_URI": path,
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_LENGTH": str(len(raw)),
            "wsgi.url_scheme": "http",
            "wsgi.input": BytesIO(raw),
            "wsgi.errors": BytesIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in (headers or {}).items()},
            **self._environ,
        }
        if self._sock is not None:
            environ["gunicorn.socket"] = self._sock
        chunks, status, out = run_wsgi_app(self._app, environ, buffered=True)
        answer = Answer(int(status.split()[0]), out, b"".join(chunks))
        contract.check(method, path, answer)
        return answer
