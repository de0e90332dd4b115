"""How the worker reads requests and sends responses, whatever pieces they come in and however slow the client is."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg2.extensions as pgx
import pytest
from harness import MARGIN, Client, Cluster, Postgres, answers, wait_until
from harness.processes import memory
from harness.work import bead, team

from loom.bounds import bounds
from loom.server.connection import HEAD_BYTES, READ_SECONDS

Sql = Callable[..., list[tuple[object, ...]]]
SMALL = b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of an application with two threads that answers in many ways."""
    with answers.served(tmp_path_factory.mktemp("answers"), threads=2) as port:
        yield port


class Raw:
    """A connection on which bytes are sent as they are."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(20)
        self.sock.connect(("127.0.0.1", port))
        self._file = self.sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def response(self) -> tuple[int, dict[str, str], bytes]:
        """The next response: status, headers by their name in lower case, and body."""
        status = self._file.readline()
        assert status, "the connection was closed without a response"
        headers = {}
        while (line := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return int(status.split()[1]), headers, self._file.read(int(headers.get("content-length", "0")))

    def closed(self) -> bool:
        """Whether the server closes the connection, with nothing more to read."""
        return self._file.read(1) == b""


@pytest.fixture
def connect(port: int) -> Iterator[Callable[..., Raw]]:
    with contextlib.ExitStack() as stack:

        def connect(**options: int) -> Raw:
            raw = Raw(port, **options)
            stack.callback(raw.sock.close)
            return raw

        yield connect


def chunked(*parts: bytes, trailers: bytes = b"") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return (
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n" + trailers + b"\r\n"
    )


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\nhello\r\n\r\nme",
        chunked(b"hello", b"\r\n\r\n", b"me"),
        chunked(b"hello\r\n\r\nme", trailers=b"X-Sum: 1\r\n"),
        b"\r\n\r\n" + chunked(b"hello\r\n\r\n0\r\n\r\n"[:9], b"me"),
    ],
)
def test_a_request_may_arrive_in_any_pieces(connect: Callable[..., Raw], request_bytes: bytes) -> None:
    raw = connect()
    raw.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in request_bytes:
        raw.send(bytes([byte]))
    assert raw.response()[::2] == (200, b"hello\r\n\r\nme")
    for size in (7, len(request_bytes)):
        for start in range(0, len(request_bytes), size):
            raw.send(request_bytes[start : start + size])
        assert raw.response()[::2] == (200, b"hello\r\n\r\nme")


def test_requests_sent_ahead_are_answered_in_order(connect: Callable[..., Raw]) -> None:
    raw = connect()
    bodies = [b"%d" % number for number in range(100)]
    raw.send(b"".join(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(b), b) for b in bodies))
    raw.send(chunked(b"last") + SMALL)
    assert [raw.response()[2] for _ in range(102)] == [*bodies, b"last", b"small"]


def test_a_body_announced_by_expect_is_asked_for(connect: Callable[..., Raw]) -> None:
    raw = connect()
    raw.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert raw.response()[0] == 100
    raw.send(b"me")
    assert raw.response()[::2] == (200, b"me")


@pytest.mark.parametrize("length", [b"Content-Length: %d" % (bounds.request + 1), b"Transfer-Encoding: chunked"])
def test_a_response_to_an_unread_body_says_that_the_connection_closes(
    connect: Callable[..., Raw], length: bytes
) -> None:
    """Else the client would send its next request on a connection that is about to be closed."""
    raw = connect()
    raw.send(b"POST /unread HTTP/1.1\r\nHost: x\r\n" + length + b"\r\n\r\n")
    with contextlib.suppress(ConnectionError):  # the server need not read all of it
        for _ in range(bounds.request // MIB + 1):
            raw.send(b"%x\r\n%b\r\n" % (MIB, b"x" * MIB))
    status, headers, _ = raw.response()
    assert (status, headers["connection"]) == (413, "close")
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.closed()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost x\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 200),
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: own\r\n\r\n0\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: cake\r\n\r\n", 417),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"A%d: b\r\n" % n for n in range(101)) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * HEAD_BYTES, 431),
    ],
)
def test_what_is_no_request_is_refused_with_a_problem_document(
    connect: Callable[..., Raw], request_bytes: bytes, status: int
) -> None:
    raw = connect()
    raw.send(request_bytes)
    got, headers, body = raw.response()
    assert got == status
    if status != 200:
        assert headers["content-type"] == "application/problem+json"
        assert b'"error":' in body
        assert body.endswith(b"}\n")
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.closed()


def test_a_body_in_chunks_of_a_few_bytes_is_refused(connect: Callable[..., Raw]) -> None:
    """Each chunk costs time, however small it is."""
    raw = connect()
    raw.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000)
    assert raw.response()[0] == 400


def test_a_body_that_ends_in_many_pieces_costs_no_more_than_one_in_few(connect: Callable[..., Raw], port: int) -> None:
    raw, began = connect(), time.monotonic()
    raw.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    raw.send(b"400000\r\n" + bytes(0x400000 - 2000))
    for _ in range(500):
        raw.send(b"\r\n\r\n")
    raw.send(b"\r\n0\r\n\r\n")
    assert len(raw.response()[2]) == 0x400000
    assert time.monotonic() - began < 2 + MARGIN


def test_clients_that_send_slowly_delay_nobody(connect: Callable[..., Raw]) -> None:
    """A byte now and then does not extend the time that a request may take."""
    slow = [connect() for _ in range(20)]
    for raw in slow[:10]:
        raw.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n")
    started = time.monotonic()
    worst = 0.0
    dripping = set(slow)
    while dripping and time.monotonic() - started < READ_SECONDS + 10:
        for raw in list(dripping):
            raw.sock.settimeout(0.001)
            with contextlib.suppress(TimeoutError):
                if raw.sock.recv(12):
                    dripping.discard(raw)
                    continue
            with contextlib.suppress(OSError):
                raw.sock.sendall(b"G")
        asked = time.monotonic()
        quick = connect()
        quick.send(SMALL)
        assert quick.response()[0] == 200
        worst = max(worst, time.monotonic() - asked)
        time.sleep(0.5)
    assert worst < 1
    assert not dripping
    assert time.monotonic() - started > READ_SECONDS - 1


def test_clients_that_never_read_delay_nobody(connect: Callable[..., Raw]) -> None:
    for _ in range(20):
        connect(receive_buffer=4096).send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
    for _ in range(10):
        quick, asked = connect(), time.monotonic()
        quick.send(SMALL)
        assert quick.response()[0] == 200
        assert time.monotonic() - asked < 1


def test_a_slow_reader_gets_the_whole_response(connect: Callable[..., Raw]) -> None:
    raw = connect(receive_buffer=4096)
    raw.send(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n" + SMALL)
    time.sleep(0.5)
    assert raw.response()[2] == answers.BIG
    assert raw.response()[2] == b"small"


def test_unread_responses_take_a_bounded_amount_of_memory(start_cluster: Callable[..., Cluster]) -> None:
    """The slowest clients lose their connections; without the bound these would take over 300 MB."""
    cluster = start_cluster(1)
    team(cluster.client())
    for number in range(4):
        bead(cluster.client(), f"bd-{number}", description="x" * 900_000)
    size = len(cluster.client().get("/api/v1/beads").body)
    assert size > 3 * MIB
    with contextlib.ExitStack() as stack:
        for _ in range(5 * bounds.buffered // size):
            raw = Raw(cluster.ports[0], receive_buffer=4096)
            stack.callback(raw.sock.close)
            raw.send(b"GET /api/v1/beads HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: cluster.client().get("/api/v1/locks").status == 200, 30)
    assert memory(cluster.pid(0)) < 256 * MIB


def test_health_live_answers_while_every_thread_is_stuck(
    start_cluster: Callable[..., Cluster], own_postgres: Postgres
) -> None:
    dsn = own_postgres.dsn(own_postgres.database())
    cluster = start_cluster(1, dsn=dsn, config="server: {threads: 4}")
    with ThreadPoolExecutor(12) as threads:
        with own_postgres.frozen():
            stuck = [threads.submit(cluster.client().post, f"/api/v1/locks/{number}", {}) for number in range(12)]
            worst = 0.0
            for _ in range(50):
                asked = time.monotonic()
                with contextlib.closing(Client(cluster.ports[0], timeout=5)) as client:
                    assert client.get("/health/live").status == 200
                worst = max(worst, time.monotonic() - asked)
            assert not any(request.done() for request in stuck)
        assert {request.result().status for request in stuck} <= {201, 503}
    assert worst < 0.5


def test_a_request_that_waited_for_a_thread_too_long_is_refused_within_the_bound(
    start_cluster: Callable[..., Cluster], session: Callable[[], pgx.connection], sql: Sql
) -> None:
    """Its time counts from its arrival, not from when a thread took it."""
    cluster = start_cluster(1, config="server: {threads: 2}\ndatabase: {timeout: 2}")
    holder = session()
    with holder.cursor() as cursor, ThreadPoolExecutor(8) as threads:
        cursor.execute("LOCK TABLE distributed_locks")
        started = time.monotonic()
        stuck = [threads.submit(cluster.client().post, f"/api/v1/locks/{number}", {}) for number in range(8)]
        assert {request.result().status for request in stuck} == {503}
        assert time.monotonic() - started < 4  # 2 s each, two at a time, would be 8


def test_idle_connections_make_room_for_new_ones(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, env={"GUNICORN_CMD_ARGS": "--worker-connections 20"})
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            raw = Raw(cluster.ports[0])
            stack.callback(raw.sock.close)
        for _ in range(5):
            with contextlib.closing(Client(cluster.ports[0], timeout=5)) as client:
                assert client.get("/health/live").status == 200
