"""Behind nginx and HAProxy, with the configurations of this tree, no request fails that could have been repeated."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Cluster, Process, free_port, program, wait_until
from harness.client import Client
from harness.cluster import ROOT
from harness.load import Call, Caller, Load, get, use_lock
from harness.locks import LOCKS

CONFIG = ROOT / "deploy/haproxy/haproxy.cfg"
GOOD = {200, 201, 204}
ROUNDS = 4  # of each instance


@pytest.fixture
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    cluster = start_cluster(3, nginx=True)
    cluster.wait_healthy()
    return cluster


@pytest.fixture
def haproxy(cluster: Cluster, tmp_path: Path) -> Iterator[str]:
    """The URL of HAProxy in front of the cluster, with our configuration, its ports replaced."""
    port = free_port()
    text = CONFIG.read_text().replace("bind :80\n", f"bind 127.0.0.1:{port}\n")
    for shown, real in zip((8080, 8081, 8082), cluster.ports, strict=True):
        text = text.replace(f"127.0.0.1:{shown}\n", f"127.0.0.1:{real}\n")
    assert len(re.findall(r"127\.0\.0\.1:(?!808)\d+", text)) == 4
    (tmp_path / "haproxy.cfg").write_text(text)
    process = Process([program("haproxy", "haproxy"), "-db", "-f", tmp_path / "haproxy.cfg"], tmp_path / "haproxy.log")
    client = Client(port, 5)

    def answers() -> bool:
        assert process.runs, process.last_lines()
        with contextlib.suppress(OSError):
            return client.get("/health/ready").status == 200
        return False

    wait_until(answers, 10)
    client.close()
    yield f"http://127.0.0.1:{port}"
    process.stop()
    print(f"--- HAProxy\n{process.last_lines()}")


@pytest.fixture(params=["nginx", "haproxy"])
def url(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    return cluster.nginx_url if request.param == "nginx" else request.getfixturevalue("haproxy")


def jobs() -> list[Callable[[Caller], object]]:
    """Locks under new names, so that a POST whose answer was lost disturbs no later one; and reads."""
    names = itertools.count()
    return [lambda call: use_lock(f"job/{next(names)}")(call)] * 6 + [get("/api/v1/locks?prefix=none")] * 2


def failed(load: Load, record_property: Callable[[str, object], None]) -> list[Call]:
    calls = [call for call in load.calls if call.status not in GOOD]
    counts = Counter((call.what.split()[0], call.status) for call in calls)
    record_property("requests", len(load.calls))
    print(f"of {len(load.calls)} requests failed: {dict(counts) or 'none'}")
    return calls


@pytest.mark.all
def test_a_restart_fails_no_request(url: str, cluster: Cluster, record_property: Callable[[str, object], None]) -> None:
    with Load([url], jobs(), pause=0.002) as load:
        time.sleep(0.5)
        for i in [0, 1, 2] * (ROUNDS // 2):
            cluster.restart(i)
        time.sleep(0.5)
    assert failed(load, record_property) == []
    assert len(load.calls) > 1000


@pytest.mark.all
def test_a_kill_fails_only_requests_that_must_not_be_repeated(
    url: str, cluster: Cluster, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    with Load([url], jobs(), pause=0.002) as load:
        for i in [0, 1, 2] * ROUNDS:
            time.sleep(0.3)
            killed = cluster.kill(i)
            wait_until(lambda i=i, killed=killed: cluster.pid(i) != killed)
            cluster.wait_serving(i)
    calls = failed(load, record_property)
    assert [call for call in calls if not call.what.startswith("POST ")] == []
    # HAProxy answers nothing, but closes the connection, when a kept connection to the instance has broken.
    assert {call.status for call in calls} <= {502, 0 if "haproxy" in request.node.name else 502}
    assert len(load.calls) > 1000


def test_haproxy_replaces_the_id_that_a_client_sends(haproxy: str) -> None:
    """With an id of its own choice, a client would be told that its write was made already."""
    client = Client(haproxy)
    path = f"{LOCKS}mine"
    token = client.post(path, {}).json["fencing_token"]
    mine = {"Loom-Proxy-Request-ID": "0123456789abcdef"}
    assert client.delete(f"{path}?fencing_token={token}", headers=mine).status == 204
    shared = "/api/v1/config/team.x"
    assert client.put(shared, {"value": 1}, headers=mine).status == 200
    assert client.put(shared, {"value": 1}, headers={**mine, "If-Match": '"9"'}).status == 412
    client.close()


def test_without_a_ready_instance_haproxy_answers_a_problem(haproxy: str, cluster: Cluster) -> None:
    for master in cluster.masters:
        master.stop(timeout=40)
    client = Client(haproxy)
    answer = client.get("/health")
    assert (answer.status, answer.json["type"], answer.headers["Retry-After"]) == (503, "/problems/unavailable", "1")
    client.close()
