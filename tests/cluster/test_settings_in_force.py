"""What is set through one instance is seen by all at once, and in force everywhere within a heartbeat."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import Client, Cluster, wait_until
from harness.locks import Sql, assert_problem
from harness.work import ask, bead, claim, team

CONFIG = "/api/v1/config"
HEARTBEAT = 6.5  # seconds; the longest between two, and some more


@pytest.fixture
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(2, config="agents: {max_concurrent: 2}\nlogging: {level: warning}\n")


@pytest.fixture
def first(cluster: Cluster) -> Client:
    return cluster.client(0)


@pytest.fixture
def second(cluster: Cluster) -> Client:
    return cluster.client(1)


def test_a_change_is_seen_through_another_instance_at_once(first: Client, second: Client) -> None:
    for n in range(100):
        assert first.put(f"{CONFIG}/agents.dead_after", {"value": 100 + n}).status == 200
        assert second.get(f"{CONFIG}/agents.dead_after").json["value"] == 100 + n
        snapshot = second.get(CONFIG).json
        assert snapshot["agents"]["dead_after"] == snapshot["shared"]["agents.dead_after"] == 100 + n
        assert second.get(f"{CONFIG}/export.yaml").body == f"agents.dead_after: {100 + n}\n".encode()


def test_a_limit_is_in_force_in_every_instance_within_a_heartbeat(first: Client, second: Client) -> None:
    team(first, "a")
    for key in ("x", "y", "z"):
        bead(first, key)
    assert first.put(f"{CONFIG}/agents.max_concurrent", {"value": 1}).status == 200
    time.sleep(HEARTBEAT)
    claim(second, "x")
    for client in (first, second):
        assert_problem(ask(client, "y"), 409, "agent-busy")
    assert second.delete(f"{CONFIG}/agents.max_concurrent").status == 204
    time.sleep(HEARTBEAT)
    claim(first, "y")  # the file's limit again
    assert_problem(ask(second, "z"), 409, "agent-busy")


def test_the_log_level_is_in_force_in_every_instance_within_a_heartbeat(cluster: Cluster, first: Client) -> None:
    def said(event: str) -> list[bool]:
        return [event in master.log.read_text() for master in cluster.masters]

    assert said("settings-shared") == said("instance-registered") == [False, False]
    assert first.put(f"{CONFIG}/agents.dead_after", {"value": 30}).status == 200
    time.sleep(HEARTBEAT)
    assert said("settings-shared") == [False, False], "the file's level lets no such line through"
    changed = time.monotonic()
    assert first.put(f"{CONFIG}/logging.level", {"value": "info"}).status == 200
    assert first.put(f"{CONFIG}/agents.dead_after", {"value": 40}).status == 200
    time.sleep(HEARTBEAT)
    assert first.put(f"{CONFIG}/agents.dead_after", {"value": 50}).status == 200
    wait_until(lambda: all(said("settings-shared")), HEARTBEAT)
    assert time.monotonic() - changed < 2 * HEARTBEAT + 1


def test_a_bad_value_put_there_by_hand_breaks_no_instance(cluster: Cluster, first: Client, sql: Sql) -> None:
    sql("""INSERT INTO config VALUES ('agents.max_concurrent', '"x"'), ('logging.level', '1e400')""")
    wait_until(lambda: all("setting-ignored" in m.log.read_text() for m in cluster.masters), HEARTBEAT)
    cluster.restart(1)
    team(first, "a")
    for key in ("x", "y", "z"):
        bead(first, key)
    claim(first, "x")
    claim(cluster.client(1), "y")
    assert_problem(ask(cluster.client(1), "z"), 409, "agent-busy")
    cluster.wait_healthy(2)
    assert not any("heartbeat-failed" in master.log.read_text() for master in cluster.masters)


def test_two_imports_at_once_leave_one_of_them_whole(first: Client, second: Client) -> None:
    keys = [f"k{n}" for n in range(100)]
    documents = ["\n".join(f"{key}: {who}" for key in order) for who, order in (("a", keys), ("b", reversed(keys)))]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            answers = threads.map(
                lambda client, text: client.post(f"{CONFIG}/import.yaml", text.encode()), (first, second), documents
            )
            assert [answer.status for answer in answers] == [200, 200]
            assert len(set(first.get(CONFIG).json["shared"].values())) == 1
