"""Headers and body leave in one send: nginx cannot retry an answer that a worker, killed between two sends, has cut."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from harness import Cluster, answers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts segments for us")

DATA_SEGMENTS_IN = struct.Struct("152xI")  # of Linux's tcp_info: data that the peer sent, in packets


def segments(sock: socket.socket) -> int:
    return DATA_SEGMENTS_IN.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, DATA_SEGMENTS_IN.size))[0]


class Connection:
    """One kept connection that says how many packets each answer took."""

    def __init__(self, port: int) -> None:
        self.conn = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        self.conn.connect()
        self.close = self.conn.close

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes, int]:
        """Return status, body and packets."""
        before = segments(self.conn.sock)
        self.conn.request(method, path, body)
        sock = self.conn.sock  # http.client lets go of it when the answer closes the connection
        answer = self.conn.getresponse()
        return answer.status, answer.read(), segments(sock) - before


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with answers.served(tmp_path_factory.mktemp("answers")) as port:
        yield port


@pytest.fixture
def connection(port: int) -> Iterator[Connection]:
    with contextlib.closing(Connection(port)) as connection:
        yield connection


def test_small_answers_are_one_packet(connection: Connection) -> None:
    assert connection.ask("GET", "/small") == (200, b"small", 1)
    assert connection.ask("GET", "/empty") == (200, b"", 1)
    assert connection.ask("GET", "/nothing") == (204, b"", 1)
    assert connection.ask("GET", "/unchanged") == (304, b"", 1)
    assert connection.ask("HEAD", "/small") == (200, b"", 1)
    assert connection.ask("GET", "/small") == (200, b"small", 1)


def test_other_answers_arrive_whole_and_in_order(connection: Connection) -> None:
    assert connection.ask("GET", "/big")[:2] == (200, answers.BIG)
    assert connection.ask("GET", "/file")[:2] == (200, answers.BIG)
    assert connection.ask("GET", "/stream")[:2] == (200, b"one,two")
    assert connection.ask("HEAD", "/big")[:2] == (200, b"")


def test_an_answer_that_fails_half_way_is_cut_and_not_continued(connection: Connection) -> None:
    with pytest.raises((http.client.IncompleteRead, http.client.RemoteDisconnected)):
        connection.ask("GET", "/cut")


def test_a_stream_is_not_held_back(connection: Connection) -> None:
    started = time.monotonic()
    connection.conn.request("GET", "/stream")
    answer = connection.conn.getresponse()
    assert answer.read1(4) == b"one,"
    assert time.monotonic() - started < 1.9  # the rest is made two seconds later
    assert answer.read() == b"two"


def test_the_answers_of_loom_are_one_packet(start_cluster: Callable[..., Cluster]) -> None:
    with contextlib.closing(Connection(start_cluster(1).ports[0])) as connection:
        taken = connection.ask("POST", "/api/v1/locks/x", b'{"owner":"me"}')
        assert (taken[0], taken[2]) == (201, 1)
        release = f"/api/v1/locks/x?fencing_token={json.loads(taken[1])['fencing_token']}"
        for method, path, status in [("GET", "/health", 200), ("DELETE", release, 204), ("GET", "/nowhere", 404)]:
            answer = connection.ask(method, path)
            assert (path, answer[0], answer[2]) == (path, status, 1)
