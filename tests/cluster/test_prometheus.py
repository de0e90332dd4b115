"""A real Prometheus alerts when an instance dies, the database is lost, or nothing is served any more.

It also has data for each panel of the dashboard.
"""

from __future__ import annotations

import json
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Client, Cluster, Postgres, wait_until
from harness.locks import acquire
from harness.metrics import MONITORING, Prometheus, families
from harness.work import bead, team

DASHBOARD = json.loads((MONITORING / "loom.dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


@pytest.fixture
def postgres(own_postgres: Postgres) -> Postgres:
    """A server of the test's own, which it may stop."""
    return own_postgres


@pytest.fixture
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    cluster = start_cluster(2)
    cluster.wait_healthy()
    return cluster


@pytest.fixture
def prometheus(cluster: Cluster, tmp_path: Path) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path, cluster.ports)
    wait_until(lambda: server.query("count(loom_active_instances)") == [2], 30, 0.2)
    yield server
    server.close()


def test_the_three_most_important_alerts_fire(cluster: Cluster, prometheus: Prometheus, postgres: Postgres) -> None:
    # Its first look at the alerts may come before its first look at the instances.
    wait_until(lambda: prometheus.firing() == set(), 40, 0.2)

    cluster.kill(0)
    wait_until(lambda: prometheus.firing() == {"LoomInstanceDied"}, 40, 0.2)
    wait_until(lambda: prometheus.query("max(loom_active_instances)") == [2], 40, 0.2)

    postgres.stop()
    wait_until(lambda: prometheus.firing() == {"LoomDatabaseLost"}, 40, 0.2)
    postgres.start()
    wait_until(lambda: "LoomDatabaseLost" not in prometheus.firing(), 40, 0.2)

    for master in cluster.masters:
        master.stop(signal.SIGTERM, 40)
    wait_until(lambda: "LoomNoActiveInstance" in prometheus.firing(), 40, 0.2)


def queries(panel: dict[str, Any]) -> list[str]:
    """The queries of a panel, as Grafana sends them when all instances are chosen."""
    texts = [target["expr"] for target in panel["targets"]]
    return [text.replace("$__rate_interval", "1m").replace("$instance", ".*") for text in texts]


@pytest.fixture
def busy(start_cluster: Callable[..., Cluster], dsn: str) -> Iterator[Cluster]:
    """Two instances with one connection each, for which requests wait."""
    cluster = start_cluster(2, dsn=f"{dsn} pool_max_conns=1")
    cluster.wait_healthy()
    first = cluster.client(0)
    team(first, "a")
    for number in range(200):
        bead(first, f"b{number}")
    ending = threading.Event()

    def work(number: int) -> None:
        client = Client(cluster.ports[number % 2], 40)
        for turn in range(10_000):
            if ending.is_set():
                break
            acquire(client, f"{number}-{turn}")
            client.post("/api/v1/locks/one", {"owner": str(number)})
            client.post("/api/v1/beads/claim", {"agent_id": "a"})
        client.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    yield cluster
    ending.set()
    for thread in threads:
        thread.join()


def test_each_query_of_the_dashboard_has_data(busy: Cluster, tmp_path: Path) -> None:
    server = Prometheus(tmp_path, busy.ports)
    try:
        for panel in PANELS:
            for query in queries(panel):

                def has_data(query: str = query) -> bool:
                    return any(not math.isnan(value) for value in server.query(query))

                print(panel["title"], query)
                wait_until(has_data, 60, 0.2)
        shown = {name for panel in PANELS for query in queries(panel) for name in re.findall(r"\bloom_\w+", query)}
        ours = [family for name, family in families(busy.client(0)).items() if name.startswith("loom_")]
        assert [family.name for family in ours if not shown & {sample.name for sample in family.samples}] == []
    finally:
        server.close()


def test_each_panel_can_be_read() -> None:
    """It says its unit, and what its numbers mean; a data source can be chosen."""
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    documented = re.findall(r"^### (.*)", (MONITORING.parents[1] / "docs/monitoring.md").read_text(), re.MULTILINE)
    assert rows == documented
    sources = {json.dumps(target["datasource"]) for panel in PANELS for target in [panel, *panel["targets"]]}
    assert sources == {'{"type": "prometheus", "uid": "${datasource}"}'}
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {"datasource", "instance"}
    for panel in PANELS:
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"], panel["title"]
        assert defaults["thresholds"]["steps"][0]["value"] is None, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
