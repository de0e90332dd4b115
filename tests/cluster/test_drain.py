"""An orderly shutdown loses no request and ends within a bound."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import Client, Cluster, Postgres, answers, wait_until
from harness.load import Caller, Load, use_lock
from harness.postgres import query

from loom.server.connection import READ_SECONDS, STOP_SECONDS

Sql = Callable[..., list[tuple[object, ...]]]
GOOD = {200, 201, 204}


def job(number: int) -> Callable[[Caller], object]:
    """Takes a lock of its own under a new name each time, renews it and gives it back."""
    names = itertools.count()
    return lambda call: use_lock(f"drain/{number}/{next(names)}")(call)


def test_a_restart_of_each_instance_fails_no_request(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(3, nginx=True)
    with Load([cluster.nginx_url], [job(i) for i in range(12)], pause=0.002) as load:
        time.sleep(0.5)
        for i in range(3):
            cluster.restart(i)
        time.sleep(0.5)
    assert [call for call in load.calls if call.status not in GOOD] == []
    assert len(load.calls) > 500


def test_a_reload_fails_no_request(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    first = cluster.pid(0)
    with Load([cluster.ports[0]], [post_over_new_connections(i) for i in range(8)], pause=0.002) as load:
        time.sleep(0.5)
        os.kill(cluster.master(0), signal.SIGHUP)
        wait_until(lambda: not os.path.exists(f"/proc/{first}"), 30)
        time.sleep(0.5)
    assert cluster.pid(0) != first
    assert [call for call in load.calls if call.status not in GOOD] == []


def post_over_new_connections(number: int) -> Callable[[Caller], object]:
    """Posts over a new connection each time."""
    names = itertools.count()

    def post(call: Caller) -> None:
        call("POST", f"/api/v1/locks/fresh/{number}/{next(names)}", {"ttl_seconds": 1})
        call.close()

    return post


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_resets_no_connection(start_cluster: Callable[..., Cluster], workers: int) -> None:
    """A refused connection may be tried elsewhere; one that was accepted must be answered."""
    cluster = start_cluster(1, config=f"server: {{workers: {workers}}}")
    with Load([cluster.ports[0]], [post_over_new_connections(i) for i in range(8)], pause=0.002) as load:
        for _ in range(3):
            time.sleep(0.5)
            cluster.restart(0)
    said = Counter(call.said for call in load.calls if call.status not in GOOD)
    assert {fault for fault in said if not fault.startswith("ConnectionRefusedError")} == set()


def test_a_draining_instance_still_serves_and_reports_that_it_is_not_ready(
    start_cluster: Callable[..., Cluster], sql: Sql
) -> None:
    cluster = start_cluster(1, config="server: {drain_seconds: 3}")
    assert cluster.client(0).get("/health/ready").status == 200
    started = time.monotonic()
    cluster.masters[0].send(signal.SIGTERM)
    wait_until(lambda: cluster.client(0).get("/health/ready").status == 503)
    wait_until(lambda: sql("SELECT status FROM instances") == [("draining",)])
    assert cluster.client(0).post("/api/v1/locks/x", {}).status == 201
    cluster.masters[0].wait(20)
    assert 3 < time.monotonic() - started < 10
    assert sql("SELECT status FROM instances") == []


def test_a_request_in_flight_is_finished(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    held = cluster.client(1).post("/api/v1/locks/x", {}).json
    answers = []
    waiter = threading.Thread(
        target=lambda: answers.append(cluster.client(0).post("/api/v1/locks/x", {"wait_seconds": 15}))
    )
    waiter.start()
    wait_until(lambda: cluster.client(1).get("/api/v1/locks/x").json["waiting"] == 1)
    cluster.masters[0].send(signal.SIGTERM)
    time.sleep(0.5)
    cluster.client(1).delete(f"/api/v1/locks/x?fencing_token={held['fencing_token']}")
    waiter.join(20)
    assert answers[0].status in (201, 409)  # granted, or asked to retry at another instance, where it keeps its place
    cluster.masters[0].wait(10)


@contextlib.contextmanager
def connections(port: int, *sent: bytes) -> Iterator[list[socket.socket]]:
    """Open a connection for each text; its client sends that text and nothing more."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in sent]
        for sock, text in zip(opened, sent, strict=True):
            sock.sendall(text)
        yield opened


REQUEST = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
HALF_A_REQUEST = b"GET /health/l"


def test_idle_connections_do_not_delay_a_shutdown(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    with connections(cluster.ports[0], REQUEST, b""):
        time.sleep(6)  # by then gunicorn no longer waits for the silent connection's first byte
        started = time.monotonic()
        cluster.masters[0].send(signal.SIGTERM)
        cluster.masters[0].wait(30)
    assert time.monotonic() - started < 10


def test_a_client_that_never_finishes_its_request_does_not_keep_the_instance_registered(
    start_cluster: Callable[..., Cluster], sql: Sql
) -> None:
    cluster = start_cluster(1)
    with connections(cluster.ports[0], HALF_A_REQUEST):
        time.sleep(0.2)
        cluster.masters[0].send(signal.SIGTERM)
        cluster.masters[0].wait(30)
    assert sql("SELECT 1 FROM instances") == []  # nor marked dead: the worker removed its row before it was killed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_ctrl_c_ends_an_instance_quickly_and_removes_its_row(
    start_cluster: Callable[..., Cluster], sql: Sql, number: signal.Signals
) -> None:
    cluster = start_cluster(1)
    assert len(sql("SELECT 1 FROM instances")) == 1
    with connections(cluster.ports[0], REQUEST, b"", HALF_A_REQUEST):
        time.sleep(0.2)
        started = time.monotonic()
        for pid in (cluster.pid(0), cluster.master(0)):  # a terminal sends it to both
            os.kill(pid, number)
        cluster.masters[0].wait(10)
    assert time.monotonic() - started < 8
    assert sql("SELECT 1 FROM instances") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_told_to_stop_while_it_starts_stops(
    start_cluster: Callable[..., Cluster], own_postgres: Postgres, number: signal.Signals
) -> None:
    """A silent database blocks the worker after the fork, while it still has its master's signal handlers."""
    dsn = own_postgres.dsn(own_postgres.database())
    cluster = start_cluster(1, dsn=dsn)
    with own_postgres.frozen():
        killed = cluster.kill(0)
        wait_until(lambda: cluster.pid(0) != killed)
        for pid in (cluster.pid(0), cluster.master(0)):
            os.kill(pid, number)
        wait_until(lambda: "Handling signal" in cluster.masters[0].log.read_text())  # and passes it on
        if number == signal.SIGINT:  # while the database is still silent
            assert cluster.masters[0].wait(15) == 0
    assert cluster.masters[0].wait(15) == 0
    assert f"Worker exiting (pid: {cluster.pid(0)})" in cluster.masters[0].log.read_text()
    assert query(dsn, "SELECT 1 FROM instances WHERE (metadata->>'pid')::int = %s", cluster.pid(0)) == []


def test_a_client_that_leaves_its_connection_open_blocks_no_other_request(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1)
    client = cluster.client(0)
    closing = REQUEST.replace(b"x\r\n", b"x\r\nConnection: close\r\n")
    with connections(cluster.ports[0], closing, closing, closing) as opened:
        for sock in opened:
            assert sock.recv(100).startswith(b"HTTP/1.1 200")
        time.sleep(0.1)
        started = time.monotonic()
        assert client.get("/health/live").status == 200
        assert time.monotonic() - started < 1.5  # the close of the others takes 2 s


def test_a_client_that_stalls_within_its_request_occupies_no_thread(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, config="server: {threads: 2}")
    half_a_body = b"POST /api/v1/locks/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{"
    with connections(cluster.ports[0], HALF_A_REQUEST, half_a_body) as (headers, body):
        time.sleep(0.3)
        assert cluster.client(0, timeout=1).get("/health").status == 200
        for sock in (headers, body):
            sock.settimeout(READ_SECONDS + 10)
            assert sock.recv(100).startswith(b"HTTP/1.1 408 ")
    assert "Traceback" not in cluster.masters[0].log.read_text()


def test_a_queued_request_whose_client_has_disconnected_is_not_started(
    start_cluster: Callable[..., Cluster], own_postgres: Postgres
) -> None:
    cluster = start_cluster(1, dsn=own_postgres.dsn(own_postgres.database()), config="server: {threads: 1}")
    with ThreadPoolExecutor(1) as threads:
        with own_postgres.frozen():
            slow = threads.submit(cluster.client(0).post, "/api/v1/locks/slow", {})
            time.sleep(0.5)
            with contextlib.closing(Client(cluster.ports[0], timeout=0.5)) as impatient, pytest.raises(TimeoutError):
                impatient.post("/api/v1/locks/unwanted", {})
            time.sleep(1)
        assert slow.result().status == 201
    assert [lock["lock_name"] for lock in cluster.client(0).get("/api/v1/locks").json] == ["slow"]


def test_a_response_that_a_client_reads_slowly_is_finished(tmp_path: Path) -> None:
    with answers.served(tmp_path) as port, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
        received = len(sock.recv(4096))
        os.kill(answers.worker(tmp_path), signal.SIGTERM)
        time.sleep(STOP_SECONDS + 1)
        while data := sock.recv(65536):
            received += len(data)
    assert received > 16 * len(answers.BIG)
