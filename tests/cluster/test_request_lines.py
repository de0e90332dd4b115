"""In a running instance: a log that nobody reads stops nothing, and each request has its line and its id."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import MARGIN, Cluster, wait_until

LOCKS = "/api/v1/locks/"


def requests(log: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == "request"]


def test_a_log_that_nobody_reads_slows_no_request_and_tells_what_was_lost(
    start_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    cluster = start_cluster(1, config=f"logging:\n  output: {pipe}\n")
    client = cluster.client(0)
    client.post(f"{LOCKS}x", {"owner": "me"})
    slowest = 0.0
    for _ in range(5000):  # more than the pipe and the queue take
        start = time.monotonic()
        assert client.get(f"{LOCKS}x").status == 200
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < MARGIN
    events = []
    while select.select([reader], [], [], 1)[0]:
        events += [line for line in os.read(reader, 1 << 20).split(b"\n") if b'"log-lines-dropped"' in line]
    os.close(reader)
    assert len(events) >= 1
    assert json.loads(events[0])["target"] == "output"


def test_a_parked_request_is_one_line_with_its_whole_duration(cluster: Cluster) -> None:
    client = cluster.client(0)
    client.post(f"{LOCKS}x", {"owner": "first"})
    assert client.post(f"{LOCKS}x", {"owner": "second", "wait_seconds": 1}, headers={"X-Request-ID": "w"}).status == 409
    log = cluster.masters[0].log
    wait_until(lambda: [line for line in requests(log) if line["request_id"] == "w"])
    (line,) = [line for line in requests(log) if line["request_id"] == "w"]
    assert line["duration_ms"] >= 1000
    assert (line["status"], line["lock"], line["port"]) == (409, "x", cluster.ports[0])


def test_a_waiter_that_hangs_up_is_logged_once_as_499(cluster: Cluster) -> None:
    cluster.client(0).post(f"{LOCKS}x", {"owner": "first"})
    body = b'{"owner": "second", "wait_seconds": 30}'
    with socket.create_connection(("127.0.0.1", cluster.ports[0])) as sock:
        head = f"POST {LOCKS}x HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: gone\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        waiting = cluster.client(1)
        wait_until(lambda: waiting.get(f"{LOCKS}x").json["waiting"] == 1)
    log = cluster.masters[0].log
    wait_until(lambda: [line for line in requests(log) if line["request_id"] == "gone"])
    (line,) = [line for line in requests(log) if line["request_id"] == "gone"]
    assert (line["status"], line["lock"]) == (499, "x")


def test_a_request_that_is_no_http_has_an_id_and_a_line(cluster: Cluster) -> None:
    with socket.create_connection(("127.0.0.1", cluster.ports[0])) as sock:
        sock.sendall(b"GET / HTTP/9.9\r\n\r\n")
        answer = sock.makefile("rb").read().decode()
    made = answer.partition("X-Request-ID: ")[2].partition("\r")[0]
    log = cluster.masters[0].log
    wait_until(lambda: [line for line in requests(log) if line["request_id"] == made])
    (line,) = [line for line in requests(log) if line["request_id"] == made]
    assert (line["status"], line["route"]) == (400, None)
