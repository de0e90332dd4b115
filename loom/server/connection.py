"""A client's connection: requests are read whole before a thread works on them, and no slow client holds a thread."""

from __future__ import annotations

import contextlib
import io
import re
import select
import socket
import time
from collections.abc import Callable
from typing import Any, cast

from gunicorn.http.errors import ChunkMissingTerminator, InvalidChunkSize, LimitRequestHeaders
from gunicorn.http.message import Request
from gunicorn.http.unreader import Unreader

from loom.bounds import bounds

READ_SECONDS = 15.0  # for a whole request, from its first byte; below a worker's graceful_timeout
WRITE_SECONDS = 30.0  # for a whole response; of a stream, for each part
LINGER_SECONDS = 2.0  # for the client to close its side: a reset would destroy a response that is on its way
STOP_SECONDS = 2.0  # for which a stopping worker keeps idle connections: a request may be on its way
HEAD_BYTES = 64 * 1024  # of a request line and headers
JOINED_BYTES = 64 * 1024  # of a body that are copied and sent together with the headers; the rest is not copied
LINE_BYTES = 4096  # of a chunk's size with its extensions, or of a trailer
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


class Chunks:
    """A chunked body (RFC 9112 section 7.1) as it arrives. Extensions and trailers are not used."""

    _SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\r\n]*)?")

    def __init__(self) -> None:
        self.body = bytearray()
        self._left = self._count = self._trailers = 0
        self._at_end_of_chunk = self._in_trailers = False

    def take(self, data: bytearray) -> bool:
        """Removes what is complete from `data`; true at the end of the body. Raises gunicorn's ParseException."""
        at, complete = 0, False
        while not complete and at < len(data):
            if self._left:
                part = data[at : at + self._left]
                self.body += part
                self._left -= len(part)
                at += len(part)
                self._at_end_of_chunk = not self._left
                continue
            end = data.find(b"\r\n", at, at + LINE_BYTES)
            if end < 0:
                if len(data) - at >= LINE_BYTES:
                    raise InvalidChunkSize(bytes(data[at : at + 20]))
                break
            line, at = bytes(data[at:end]), end + 2
            if self._at_end_of_chunk:
                if line:
                    raise ChunkMissingTerminator(line[:20])
                self._at_end_of_chunk = False
            elif self._in_trailers:
                complete = not line
                self._trailers += len(line)
                if self._trailers > HEAD_BYTES or b"\n" in line:
                    raise LimitRequestHeaders("limit request trailers size")
            else:
                self._begin_chunk(line)
        del data[:at]
        return complete

    def _begin_chunk(self, line: bytes) -> None:
        match = self._SIZE.fullmatch(line)
        if match is None:
            raise InvalidChunkSize(line[:20])
        self._left = int(match[1], 16)
        self._in_trailers = not self._left
        self._count += 1
        if self._count > 1000 and len(self.body) < 16 * self._count:  # many tiny chunks would only cost CPU time
            raise InvalidChunkSize(b"chunks of a few bytes")


class Connection:
    """One client. At any time it belongs to one thread, or waits in the loop for an event or for its deadline."""

    def __init__(self, sock: socket.socket, client: Any, server: Any, cfg: Any) -> None:
        sock.setblocking(False)
        self.sock, self.client, self.server, self._cfg = sock, client, server, cfg
        self.fd = sock.fileno()
        self.on_event: Callable[..., None]  # what a thread does at the next event
        self.on_deadline: Callable[[Connection], None]  # what the main thread does at the deadline
        self.deadline = 0.0  # of time.monotonic(), as all times here
        self.read_deadline = 0.0  # of the request that has begun to arrive
        self.ready_at = 0.0  # when the current request was complete
        self.environ: dict[str, Any] | None = None  # of the request that waits for its result, see parking.py
        self.request: Request | None = None  # the one that is arriving, once its head is complete
        self.unsent: list[memoryview] = []  # the parts of the response that the client has not taken yet
        self.body_bytes = 0  # of the current request
        self.accounted_bytes = 0  # the value of `buffered` that the loop has added to its total
        self.on_close: Callable[[], None] | None = None
        self._chunks: Chunks | None = None
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
    def buffered(self) -> int:
        """The bytes that this connection keeps in memory."""
        arriving = 0 if self._chunks is None else len(self._chunks.body)
        return len(self._input) + arriving + self.body_bytes + sum(map(len, self.unsent))

    def receive(self) -> None:
        """Reads what has arrived. Raises EOFError or OSError when the client is gone."""
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
        """Returns the next request once it is complete, with its body in memory. Raises gunicorn's ParseException."""
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
        self.body_bytes = len(body)
        self.ready_at = time.monotonic()
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
        """Returns the body of the current request once it has arrived; None before.

        If the body is too large, returns as much as the application needs to refuse it, and the connection is closed
        after the response.
        """
        length = self._body_length()
        if length is None:
            return self._take_chunks(request)
        if length > bounds.request:
            request.force_close()
            return b""
        if len(self._input) < length:
            return None
        with memoryview(self._input) as arrived:  # a slice of the array itself would be one copy more
            body = bytes(arrived[:length])
        if length == len(self._input):
            self._input = bytearray()
        else:
            del self._input[:length]
        return body

    def _take_chunks(self, request: Request) -> bytes | None:
        if self._chunks is None:
            self._chunks = Chunks()
        complete = self._chunks.take(self._input)
        body = self._chunks.body
        if not complete and len(body) <= bounds.request:
            return None
        if not complete:
            request.force_close()
        self._chunks = None
        return bytes(body)

    def send_rest(self) -> bool:
        """Sends more of the response; true when all of it is sent. Raises OSError when the client is gone."""
        while self.unsent:
            try:
                sent = self.sock.send(self.unsent[0])
            except BlockingIOError:
                first = self.unsent[0]
                if 2 * len(first) < len(cast(bytes, first.obj)):  # a view keeps the whole in memory
                    self.unsent[0] = memoryview(bytes(first))
                return False
            self.unsent[0] = self.unsent[0][sent:]
            if not self.unsent[0]:
                del self.unsent[0]
        return True

    def has_input(self) -> bool:
        """Whether a byte can be read at once; the end of the input does not count."""
        with contextlib.suppress(OSError):
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        return False

    def discard_input(self) -> None:
        """Reads what has arrived, and forgets it. Raises EOFError or OSError when the client has closed."""
        self._input.clear()
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):  # then other connections have their turn
                if not self.sock.recv(RECEIVE_BYTES):
                    raise EOFError


class Output:
    """What gunicorn's Response writes to: sends headers and the first part of the body together.

    If a worker is killed between the two, nginx has seen the headers and cannot ask another instance for the answer.
    What the client does not take at once is left in `connection.unsent`, for the loop to send; only if another part
    follows, the thread waits for the client.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._head: bytes | None = b""  # empty until it is given; None once it is sent

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
        """Sends the headers of a response without a body."""
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


# Runs a complete request; true if the next request of the connection may follow at once.
Run = Callable[[Connection, Request], bool]
