"""/health is true and bounded, for people, load balancers and process supervisors."""

from __future__ import annotations

import time

from harness import AppClient
from harness.locks import instant

from loom import __version__, db
from loom.instances import Instance


def test_health_begins_with_the_guides_four_fields(client: AppClient, instance: Instance) -> None:
    answer = client.get("/health")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    health = answer.json
    assert list(health)[:4] == ["healthy", "instance_id", "database", "active_instances"]
    assert health["healthy"] is True
    assert health["instance_id"] == instance.instance_id
    assert health["database"] == "connected"
    assert health["active_instances"] == 1


def test_health_also_shows_details(client: AppClient) -> None:
    health = client.get("/health").json
    assert (health["status"], health["version"], health["draining"]) == ("healthy", __version__, False)
    assert health["uptime_seconds"] >= 0
    assert instant(health["timestamp"])
    assert health["dependencies"]["database"]["status"] == "healthy"
    assert health["dependencies"]["database"]["latency_ms"] >= 0
    assert health["metrics"]["connections"]["max"] == 10


def test_a_serving_instance_is_live_and_ready(client: AppClient) -> None:
    live, ready = client.get("/health/live"), client.get("/health/ready")
    assert (live.status, live.json["status"]) == (200, "alive")
    assert (ready.status, ready.json["ready"], ready.json["draining"]) == (200, True, False)
    assert client.get("/api/v1/health").json == {"status": "ok"}


def test_a_draining_instance_is_healthy_but_not_ready(client: AppClient, instance: Instance) -> None:
    instance.drain()
    assert (client.get("/health").status, client.get("/health").json["draining"]) == (200, True)
    ready = client.get("/health/ready")
    assert (ready.status, ready.json["ready"], ready.json["draining"]) == (503, False, True)
    assert client.get("/health/live").status == 200


def test_an_instance_that_was_removed_from_the_registry_still_answers_health(
    client: AppClient, instance: Instance
) -> None:
    """It does not wait for a new id: supervisors decide by it about a restart."""

    def seconds(path: str) -> float:
        started = time.monotonic()
        assert client.get(path).status == 200
        return time.monotonic() - started

    instance._last_good = float("-inf")
    with instance._beating:  # a heartbeat is under way
        for path in ("/health", "/health/live", "/health/ready", "/api/v1/health"):
            assert min(seconds(path) for _ in range(3)) < 0.9  # load delays some of the three, a wait all
        assert client.get("/api/v1/locks").status == 503, "others wait for it, within a bound"


def test_usage_of_the_pool_is_shown(client: AppClient, database: db.Database) -> None:
    with database.connection(), database.connection():
        connections = client.get("/health").json["metrics"]["connections"]
    assert connections["open"] >= 3
    assert connections["waiting"] == 0
    assert connections["open"] - connections["idle"] >= 2
