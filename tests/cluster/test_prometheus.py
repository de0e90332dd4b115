"""A real Prometheus alerts when an instance dies, the database is lost, or nothing is served any more."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Cluster, Postgres, wait_until
from harness.metrics import Prometheus


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
