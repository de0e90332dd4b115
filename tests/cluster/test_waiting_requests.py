"""Requests that wait for a lock or an event hold their connections, and no thread."""

from __future__ import annotations

import contextlib
import json
import resource
import select
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from harness import Client, Cluster, wait_until
from harness.processes import memory

Sql = Callable[..., list[tuple[object, ...]]]
LOCK = "/api/v1/locks/build"
MANY = 2000
MIB = 1024 * 1024


class Waiters:
    """Requests sent over a connection each, whose responses arrive later."""

    def __init__(self, url: str | int) -> None:
        parts = urlsplit(f"http://127.0.0.1:{url}" if isinstance(url, int) else url)
        self._address = (parts.hostname, parts.port)
        self._poll = select.poll()
        self._waiting: dict[int, tuple[socket.socket, int]] = {}
        self._sent = 0

    def send(self, method: str, path: str, body: object = None, padding: int = 0) -> int:
        """Send a request, with so many spaces behind its body, and return its number, from 0."""
        content = b"" if body is None else json.dumps(body).encode() + b" " * padding
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        sock = socket.create_connection(self._address)
        sock.sendall(head.encode() + content)
        self._waiting[sock.fileno()] = (sock, self._sent)
        self._poll.register(sock, select.POLLIN)
        self._sent += 1
        return self._sent - 1

    def responses(self, seconds: float) -> Iterator[tuple[int, int, dict[str, object]]]:
        """Yield number, status and JSON of each response as it arrives, until all have, or `seconds` have passed."""
        ends = time.monotonic() + seconds
        while self._waiting and time.monotonic() < ends:
            for fd, _ in self._poll.poll(100):
                sock, number = self._waiting.pop(fd)
                self._poll.unregister(fd)
                with sock, sock.makefile("rb") as file:
                    status, length = file.readline(), 0
                    while (line := file.readline()) not in (b"\r\n", b""):
                        name, _, value = line.partition(b":")
                        length = int(value) if name.lower() == b"content-length" else length
                    yield number, int(status.split()[1]), json.loads(file.read(length) or "{}")

    def close(self) -> None:
        for sock, _ in self._waiting.values():
            sock.close()
        self._waiting.clear()


@pytest.fixture(autouse=True)
def many_open_files() -> None:
    """Of this process; a limit of 1,024 is common."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * MANY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * MANY), hard))


@pytest.fixture
def waiters() -> Iterator[Callable[[str | int], Waiters]]:
    with contextlib.ExitStack() as stack:

        def make(url: str | int) -> Waiters:
            made = Waiters(url)
            stack.callback(made.close)
            return made

        yield make


def live_seconds(cluster: Cluster, count: int) -> list[float]:
    """How long GET /health/live takes, `count` times."""
    client, seconds = cluster.client(), []
    for _ in range(count):
        asked = time.monotonic()
        assert client.get("/health/live").status == 200
        seconds.append(time.monotonic() - asked)
    return seconds


def hold(cluster: Cluster, **more: object) -> int:
    """Take the lock and return its token."""
    held = cluster.client().post(LOCK, {"owner": "holder", "ttl_seconds": 300, **more})
    assert held.status == 201
    return held.json["fencing_token"]


def test_two_thousand_requests_wait_for_a_lock_in_one_instance(
    start_cluster: Callable[..., Cluster], waiters: Callable[..., Waiters], sql: Sql
) -> None:
    cluster = start_cluster(1)
    hold(cluster)
    waiting = waiters(cluster.ports[0])
    for number in range(MANY):
        waiting.send("POST", LOCK, {"owner": f"w{number}", "wait_seconds": 20})
    wait_until(lambda: cluster.client().get(LOCK).json["waiting"] == MANY, 20)
    assert statistics.median(live_seconds(cluster, 200)) < 0.05
    assert cluster.client().post("/api/v1/locks/other", {}).status == 201
    statuses = Counter(status for _, status, _ in waiting.responses(40))
    assert statuses == {409: MANY}
    assert memory(cluster.pid(0)) < 256 * MIB


def test_two_thousand_requests_wait_for_an_event_in_one_instance(
    start_cluster: Callable[..., Cluster], waiters: Callable[..., Waiters]
) -> None:
    cluster = start_cluster(1)
    waiting = waiters(cluster.ports[0])
    for _ in range(MANY):
        waiting.send("GET", "/api/v1/events?after=0&wait_seconds=25")
    assert statistics.median(live_seconds(cluster, 200)) < 0.05
    assert cluster.client().put("/api/v1/config/k", {"value": 1}).status in (200, 201)
    answers = list(waiting.responses(24))
    assert Counter((status, answer["count"]) for _, status, answer in answers) == {(200, 1): MANY}
    assert memory(cluster.pid(0)) < 256 * MIB


def test_a_lock_passes_through_three_instances_in_the_order_of_the_queue(
    start_cluster: Callable[..., Cluster], waiters: Callable[..., Waiters], sql: Sql
) -> None:
    cluster = start_cluster(3, nginx=True)
    token = hold(cluster)
    waiting = waiters(cluster.nginx_url)
    for number in range(60):
        waiting.send("POST", LOCK, {"owner": f"w{number}", "wait_seconds": 30})
    wait_until(lambda: cluster.client().get(LOCK).json["waiting"] == 60)
    queue = [owner for (owner,) in sql("SELECT owner FROM lock_waiters ORDER BY place")]
    nginx = cluster.nginx_client()
    assert nginx.delete(f"{LOCK}?fencing_token={token}").status == 204
    granted = []
    for _, status, grant in waiting.responses(30):
        assert status == 201
        granted.append(grant["owner"])
        assert nginx.delete(f"{LOCK}?fencing_token={grant['fencing_token']}").status == 204
    assert granted == queue


def test_a_request_without_an_owner_keeps_its_place(
    start_cluster: Callable[..., Cluster], waiters: Callable[..., Waiters]
) -> None:
    """The owner that is made for it stays the same while it waits."""
    cluster = start_cluster(1)
    token = hold(cluster)
    waiting = waiters(cluster.ports[0])
    waiting.send("POST", LOCK, {"wait_seconds": 20})
    wait_until(lambda: cluster.client().get(LOCK).json["waiting"] == 1)
    cluster.client().delete(f"{LOCK}?fencing_token={token}")
    assert [status for _, status, _ in waiting.responses(5)] == [201]


def test_a_request_whose_client_hangs_up_gives_up_its_place(
    start_cluster: Callable[..., Cluster], waiters: Callable[..., Waiters]
) -> None:
    cluster = start_cluster(1)
    token = hold(cluster)
    gone, stays = waiters(cluster.ports[0]), waiters(cluster.ports[0])
    for number in range(20):
        gone.send("POST", LOCK, {"owner": f"gone{number}", "wait_seconds": 30})
    wait_until(lambda: cluster.client().get(LOCK).json["waiting"] == 20)
    stays.send("POST", LOCK, {"owner": "stays", "wait_seconds": 30})
    gone.close()
    wait_until(lambda: cluster.client().get(LOCK).json["waiting"] == 1, 5)
    cluster.client().delete(f"{LOCK}?fencing_token={token}")
    assert [(status, grant["owner"]) for _, status, grant in stays.responses(5)] == [(201, "stays")]


def test_clients_that_hang_up_as_their_wait_begins_are_forgotten(
    start_cluster: Callable[..., Cluster], waiters: Callable[..., Waiters]
) -> None:
    cluster = start_cluster(1)
    token = hold(cluster)
    gone = [waiters(cluster.ports[0]) for _ in range(300)]
    for number, waiter in enumerate(gone):
        waiter.send("POST", LOCK, {"owner": f"gone{number}", "wait_seconds": 3})
        if number >= 5:
            gone[number - 5].close()  # a few milliseconds after it was sent
    for waiter in gone:
        waiter.close()
    wait_until(lambda: cluster.client().get(LOCK).json["waiting"] == 0)
    cluster.client().delete(f"{LOCK}?fencing_token={token}")
    assert cluster.client().post(LOCK, {"owner": "real", "wait_seconds": 5}).status == 201


def test_the_bodies_of_requests_that_wait_take_a_bounded_amount_of_memory(
    start_cluster: Callable[..., Cluster], waiters: Callable[..., Waiters]
) -> None:
    cluster = start_cluster(1)
    hold(cluster)
    waiting = waiters(cluster.ports[0])
    for number in range(200):
        waiting.send("POST", LOCK, {"owner": f"w{number}", "wait_seconds": 20}, padding=MIB - 1000)
    wait_until(lambda: cluster.client().get(LOCK).json["waiting"] > 20)
    assert memory(cluster.pid(0)) < 256 * MIB


def test_requests_that_wait_are_answered_when_the_instance_stops(
    start_cluster: Callable[..., Cluster], waiters: Callable[..., Waiters]
) -> None:
    cluster = start_cluster(1)
    hold(cluster)
    waiting = waiters(cluster.ports[0])
    for number in range(50):
        waiting.send("POST", LOCK, {"owner": f"w{number}", "wait_seconds": 30})
        waiting.send("GET", "/api/v1/events?after=0&wait_seconds=25")
    wait_until(lambda: cluster.client().get(LOCK).json["waiting"] == 50)
    cluster.masters[0].send(signal.SIGTERM)
    assert Counter(status for _, status, _ in waiting.responses(15)) == {409: 50, 200: 50}
    assert cluster.masters[0].wait(15) == 0


def test_a_response_that_was_waited_for_keeps_its_connection(start_cluster: Callable[..., Cluster]) -> None:
    """Also for a request that the client has sent ahead."""
    cluster = start_cluster(1)
    head = b"POST /api/v1/locks/build HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33\r\n\r\n"
    ask = head + b'{"owner":"me2", "wait_seconds":1}'
    hold(cluster)
    with socket.create_connection(("127.0.0.1", cluster.ports[0]), timeout=10) as sock, sock.makefile("rb") as file:
        sock.sendall(ask + b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = file.read()
    assert received.startswith(b"HTTP/1.1 409")
    assert received.count(b"HTTP/1.1 200") == 1


def test_the_poll_ends_with_the_last_request_that_waits(
    start_cluster: Callable[..., Cluster], waiters: Callable[..., Waiters], sql: Sql
) -> None:
    cluster = start_cluster(1)
    hold(cluster)
    waiting = waiters(cluster.ports[0])
    waiting.send("POST", LOCK, {"owner": "w", "wait_seconds": 1})
    assert [status for _, status, _ in waiting.responses(5)] == [409]
    polls = "SELECT query_start FROM pg_stat_activity WHERE application_name LIKE 'loom:%%waiters'"
    before = sql(polls)
    with contextlib.closing(Client(cluster.ports[0])) as client:
        client.get("/health")
    time.sleep(0.3)  # six polls
    assert before == sql(polls) != []
