"""/metrics of real gunicorns: a scrape answers for all workers of a port, and what has died is seen."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

from harness import Cluster, wait_until
from harness.client import Client
from harness.locks import acquire, release
from harness.metrics import families, value

EVENTS = "loom_failover_events_total"


def scraped(port: int, name: str, **labels: str) -> float | None:
    """The value at this port, over a new connection: any of its workers may answer."""
    with closing(Client(port)) as client:
        return value(client, name, **labels)


def test_a_scrape_answers_for_all_workers_of_a_port_and_no_counter_goes_back(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(1, config="server: {workers: 3}")
    (port,) = cluster.ports

    def workers() -> set[str]:
        with closing(Client(port)) as client:
            return {sample.labels["instance_id"] for sample in families(client)["loom_draining"].samples}

    wait_until(lambda: len(workers()) == 3)
    live = partial(scraped, port, "loom_http_requests_total", route="/health/live")
    before = live() or 0
    seen: dict[str, float] = {}
    for _ in range(60):
        with closing(Client(port)) as client:
            assert client.get("/health/live").status == 200
            requests = families(client)["loom_http_requests"].samples
        for sample in requests:
            if sample.labels["route"] == "/health/live":
                key = sample.labels["instance_id"]
                assert sample.value >= seen.get(key, 0), "a counter went back"
                seen[key] = sample.value
    assert len(seen) > 1, "the workers shared the requests"
    wait_until(lambda: (live() or 0) - before == 60)
    dead = cluster.kill(0)
    wait_until(lambda: cluster.pid(0) != dead and len(workers()) == 3)


def test_a_killed_instance_is_counted_as_died_and_as_replaced(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2)
    cluster.wait_healthy()
    assert scraped(cluster.ports[1], EVENTS, event="instance_died") == 0
    assert scraped(cluster.ports[0], EVENTS, event="instance_replaced") == 0
    dead = cluster.kill(0)
    wait_until(lambda: scraped(cluster.ports[1], EVENTS, event="instance_died") == 1, 30, 0.5)
    assert scraped(cluster.ports[1], "loom_dead_instances") == 1
    wait_until(lambda: cluster.pid(0) != dead)
    cluster.wait_serving(0)
    assert scraped(cluster.ports[0], EVENTS, event="instance_replaced") == 1
    cluster.restart(1)
    assert scraped(cluster.ports[1], EVENTS, event="instance_replaced") == 0, "an orderly end is not a death"


def test_the_time_to_acquire_a_lock_includes_the_wait(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    (port,) = cluster.ports
    token = acquire(cluster.client(), owner="a")["fencing_token"]
    seconds = partial(scraped, port, "loom_lock_acquire_seconds_sum", outcome="acquired")
    waiting = partial(scraped, port, "loom_waiting_requests", **{"for": "locks"})
    before, started = seconds() or 0, time.monotonic()
    thread = threading.Thread(target=acquire, args=(cluster.client(),), kwargs={"owner": "b", "wait_seconds": 20})
    thread.start()
    wait_until(lambda: waiting() == 1 and time.monotonic() - started > 1)
    waited = time.monotonic() - started - 0.5
    release(cluster.client(), token)
    thread.join()
    assert (seconds() or 0) - before >= waited
    assert waiting() == 0


def test_requests_that_the_server_refuses_are_counted(start_cluster: Callable[..., Cluster]) -> None:
    (port,) = start_cluster(1).ports
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(b"no HTTP\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
    labels = {"route": "unmatched", "method": "other", "status": "400"}
    assert scraped(port, "loom_http_requests_total", **labels) == 1
