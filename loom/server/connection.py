"""A client's connection: requests are read whole before a thread works on them, and no slow client holds a thread."""

from __future__ import annotations

import contextlib
import io
import select
import socket
import time
from collections.abc import Callable
from typing import Any, cast

from gunicorn.http.body import ChunkedReader
from gunicorn.http.errors import LimitRequestHeaders
from gunicorn.http.message import Request
from gunicorn.http.unreader import Unreader

READ_SECONDS = 15.0  # for a whole request, from its first byte; below a worker's graceful_timeout
WRITE_SECONDS = 30.0  # for a whole response; of a stream, for each part
LINGER_SECONDS = 2.0  # that the client has to close its side, so that no reset destroys a response on its way
STOP_SECONDS = 2.0  # for which a stopping worker keeps idle connections: a request may be on its way
HEAD_BYTES = 64 * 1024  # of a request line and headers
BODY_BYTES = 8 * 1024 * 1024  # of a request; the application, which knows the route, refuses less
BUFFERED_BYTES = 64 * 1024 * 1024  # that the incomplete requests and unread responses of all clients may take together
JOINED_BYTES = 64 * 1024  # of a body that are copied behind the headers into one send; the rest is not copied
RECEIVE_BYTES = 64 * 1024  # the least that one read asks for


class Incomplete(Exception):
    """The rest of the request has not arrived yet."""


class Arrived(Unreader):
    """The bytes that have arrived, for gunicorn's parser. Raises Incomplete where a socket would wait."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.buf.write(data)

    def chunk(self, size_hint: int | None = None) -> bytes:
        raise Incomplete


class Connection:
    """One client. At any time it belongs to one thread, or waits in the loop for an event or for its deadline."""

    def __init__(self, sock: socket.socket, client: Any, server: Any, cfg: Any) -> None:
        sock.setblocking(False)
        self.sock, self.client, self.server, self._cfg = sock, client, server, cfg
        self.fd = sock.fileno()
        self.on_event: Callable[..., None]  # what a thread does at the next event, and the main thread at the deadline
        self.on_deadline: Callable[[Connection], None]
        self.deadline = 0.0  # of time.monotonic(), as all times here
        self.read_deadline = 0.0  # of the request that has begun to arrive
        self.ready_at = 0.0  # when the current request was complete
        self.environ: dict[str, Any] | None = None  # of a request that waits
        self.request: Request | None = None  # whose head is complete
        self.unsent: list[memoryview] = []  # the parts of the response that the client has not taken yet
        self._input = bytearray()
        self._searched = 0  # bytes of the input in which its end was not found

    @property
    def idle(self) -> bool:
        """Whether no byte of a further request has arrived."""
        return self.request is None and not self._input

    @property
    def began(self) -> float:
        """When the first byte of the current request arrived."""
        return self.read_deadline - READ_SECONDS

    @property
    def keeps_much(self) -> bool:
        return self.buffered > BUFFERED_BYTES // 1000

    @property
    def buffered(self) -> int:
        """The bytes that this connection keeps in memory."""
        return len(self._input) + sum(map(len, self.unsent))

    def receive(self) -> None:
        """Read what has arrived. Raises EOFError or OSError when the client is gone."""
        was_idle = self.idle
        wanted = 0 if self.request is None else (self._body_length() or 0) - len(self._input)
        with contextlib.suppress(BlockingIOError):
            data = self.sock.recv(max(RECEIVE_BYTES, min(wanted, 1024 * 1024)))
            if not data:
                raise EOFError
            self._input += data
            if was_idle:
                self.read_deadline = time.monotonic() + READ_SECONDS

    def next_request(self) -> Request | None:
        """Return the next request once it is complete, with its body in memory. Raises gunicorn's ParseException."""
        if self.request is None:
            if not self._input:
                return None
            self.request = self._parse_head()
            if self.request is None:
                return None
        body = self._take_body(self.request)
        if body is None:
            if self.request._expected_100_continue:
                self.request._expected_100_continue = False
                with contextlib.suppress(BlockingIOError):
                    self.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        request, self.request, self._searched = self.request, None, 0
        request._expected_100_continue = False
        request.body = io.BytesIO(body)
        self.ready_at = time.monotonic()
        self.read_deadline = self.ready_at + READ_SECONDS  # of a request behind it whose first bytes are here
        return request

    def _parse_head(self) -> Request | None:
        if self._input[0] in b"\r\n":  # RFC 9112 section 2.2: empty lines before a request are ignored
            self._input = self._input.lstrip(b"\r\n")
        if self._input.find(b"\r\n\r\n", max(0, self._searched - 3)) < 0 and len(self._input) <= HEAD_BYTES:
            self._searched = len(self._input)
            return None
        source = Arrived(bytes(self._input))
        try:
            request = Request(self._cfg, source, self.client)
        except Incomplete:
            raise LimitRequestHeaders("limit request headers size") from None
        self._input, self._searched = bytearray(source.take_buffered()), 0
        return request

    def _body_length(self) -> int | None:
        """The Content-Length of the current request; None if its body is chunked."""
        assert self.request is not None
        return getattr(self.request.body.reader, "length", None)

    def _take_body(self, request: Request) -> bytes | None:
        """The body of the current request, if it has arrived. Of one that is too large, what the application needs to
        refuse it; then the connection is closed after the response."""
        length = self._body_length()
        if length is None:
            return self._take_chunks(request)
        if length > BODY_BYTES:
            request.force_close()
            return b""
        if len(self._input) < length:
            return None
        body = bytes(self._input[:length])
        del self._input[:length]
        return body

    def _take_chunks(self, request: Request) -> bytes | None:
        too_large = len(self._input) > BODY_BYTES
        if self._input.find(b"\r\n\r\n", max(0, self._searched - 3)) < 0 and not too_large:
            self._searched = len(self._input)
            return None
        source = Arrived(bytes(self._input))
        try:
            body = ChunkedReader(request, source).read(BODY_BYTES + 1)
        except Incomplete:
            self._searched = len(self._input)
            if not too_large:
                return None
            request.force_close()
            return bytes(self._input)
        if len(body) > BODY_BYTES:
            request.force_close()
        self._input = bytearray(source.take_buffered())
        return body

    def send_rest(self) -> bool:
        """Send more of the response; true when all of it is sent. Raises OSError when the client is gone."""
        while self.unsent:
            try:
                sent = self.sock.send(self.unsent[0])
            except BlockingIOError:
                first = self.unsent[0]
                if 2 * len(first) < len(cast(bytes, first.obj)):  # which stays in memory as a whole
                    self.unsent[0] = memoryview(bytes(first))
                return False
            self.unsent[0] = self.unsent[0][sent:]
            if not self.unsent[0]:
                del self.unsent[0]
        return True

    def discard_input(self) -> None:
        """Read and forget. Raises EOFError or OSError when the client has closed."""
        self._input.clear()
        with contextlib.suppress(BlockingIOError):
            while self.sock.recv(RECEIVE_BYTES):
                pass
            raise EOFError


class Output:
    """What gunicorn's Response writes to: sends headers and the first part of the body together.

    If a worker is killed between the two, nginx has seen the headers and cannot ask another instance for the answer.
    What the client does not take at once is left in `connection.unsent`, for the loop to send; only if another part
    follows, the thread waits for the client.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._head: bytes | None = b""

    def sendall(self, data: bytes) -> None:
        if self._head == b"":
            self._head = data
            return
        parts = [data]
        if self._head is not None:
            parts, self._head = [self._head + data[:JOINED_BYTES], data[JOINED_BYTES:]], None
        self._wait_until_sent()
        self._send(*parts)

    def flush(self) -> None:
        """Send the headers of a response without a body."""
        head, self._head = self._head, None
        if head:
            self._send(head)

    def _send(self, *parts: bytes) -> None:
        self._connection.unsent += [memoryview(part) for part in parts if part]
        self._connection.send_rest()

    def _wait_until_sent(self) -> None:
        deadline = time.monotonic() + WRITE_SECONDS
        while not self._connection.send_rest():
            poller = select.poll()
            poller.register(self._connection.fd, select.POLLOUT)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("the client does not read its response")


Run = Callable[[Connection, Request], bool]
