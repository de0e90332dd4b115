"""A setting changed through one instance is visible through all at once, and in force everywhere within a heartbeat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import MARGIN, Client, Cluster, Postgres, wait_until
from harness.cluster import ROOT
from harness.locks import Sql, assert_problem
from harness.postgres import SUPERUSER
from harness.work import ask, bead, claim, team

CONFIG = "/api/v1/config"
HEARTBEAT = 6 + MARGIN  # seconds: the longest interval between two


@pytest.fixture
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    return start_cluster(2, config="agents: {max_concurrent: 2}\nlogging: {level: warning}\n")


@pytest.fixture
def first(cluster: Cluster) -> Client:
    return cluster.client(0)


@pytest.fixture
def second(cluster: Cluster) -> Client:
    return cluster.client(1)


def test_a_change_is_visible_through_another_instance_at_once(first: Client, second: Client) -> None:
    for n in range(100):
        assert first.put(f"{CONFIG}/agents.dead_after", {"value": 100 + n}).status == 200
        assert second.get(f"{CONFIG}/agents.dead_after").json["value"] == 100 + n
        snapshot = second.get(CONFIG).json
        assert snapshot["agents"]["dead_after"] == snapshot["shared"]["agents.dead_after"] == 100 + n
        assert second.get(f"{CONFIG}/export.yaml").body == f"agents.dead_after: {100 + n}\n".encode()


@pytest.mark.parametrize(("size", "lines"), [("?pool_max_conns=25", 1), ("?pool_max_conns=4", 0), ("", 0)])
def test_a_pool_that_is_larger_than_the_threads_can_use_is_logged_once(
    start_cluster: Callable[..., Cluster], postgres: Postgres, database_name: str, size: str, lines: int
) -> None:
    dsn = f"postgresql://{SUPERUSER}@127.0.0.1:{postgres.port}/{database_name}{size}"
    log = start_cluster(1, dsn=dsn, config="server: {threads: 4}").masters[0].log.read_text()
    found = [json.loads(line) for line in log.splitlines() if "pool-exceeds-threads" in line]
    assert [(line["pool_max_conns"], line["threads"]) for line in found] == [(25, 4)] * lines


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
    assert said("settings-shared") == [False, False], "the level of the file hides such lines"
    changed = time.monotonic()
    assert first.put(f"{CONFIG}/logging.level", {"value": "info"}).status == 200
    assert first.put(f"{CONFIG}/agents.dead_after", {"value": 40}).status == 200
    time.sleep(HEARTBEAT)
    assert first.put(f"{CONFIG}/agents.dead_after", {"value": 50}).status == 200
    wait_until(lambda: all(said("settings-shared")), HEARTBEAT)
    assert time.monotonic() - changed < 2 * HEARTBEAT + 1


def test_a_bad_value_written_by_hand_breaks_no_instance(cluster: Cluster, first: Client, sql: Sql) -> None:
    sql("""INSERT INTO config VALUES ('agents.max_concurrent', '"x"'), ('logging.level', '1e300')""")
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


# config.yaml, while Loom runs

PRELOAD = pytest.mark.parametrize("options", ["", "--preload"])
TYPO = "agents: {max_concurent: 9}\n"


def limit(client: Client) -> int:
    return client.get(CONFIG).json["agents"]["max_concurrent"]


def claims_until_busy(client: Client) -> int:
    """Return how many claims an agent may hold: the limit that claims obey, as opposed to the one that is shown."""
    name = str(uuid.uuid4())
    team(client, name)
    for n in range(9):
        bead(client, f"{name}-{n}")
        if ask(client, f"{name}-{n}", name).status != 200:
            return n
    return 9


@PRELOAD
@pytest.mark.parametrize("text", ["agents: {max_concurrent: 3}\n", TYPO, None], ids=["changed", "broken", "gone"])
def test_a_replaced_worker_uses_the_settings_that_its_master_read(
    start_cluster: Callable[..., Cluster], options: str, text: str | None
) -> None:
    """Otherwise HTTP and upkeep of a worker had different limits, and a typo ended the instance at the next crash."""
    cluster = start_cluster(1, config="agents: {max_concurrent: 2}\n", env={"GUNICORN_CMD_ARGS": options})
    file = cluster.folder / "config.yaml"
    file.unlink() if text is None else file.write_text(text)
    killed = cluster.kill(0)
    wait_until(lambda: cluster.pid(0) != killed)
    cluster.wait_healthy(1)
    assert limit(cluster.client(0)) == claims_until_busy(cluster.client(0)) == 2


@PRELOAD
def test_a_reload_puts_a_changed_file_in_force(start_cluster: Callable[..., Cluster], options: str) -> None:
    cluster = start_cluster(1, config="agents: {max_concurrent: 2}\n", env={"GUNICORN_CMD_ARGS": options})
    (cluster.folder / "config.yaml").write_text("agents: {max_concurrent: 3}\nlogging: {format: text}\n")
    reload(cluster)
    assert limit(cluster.client(0)) == claims_until_busy(cluster.client(0)) == 3
    assert " info instance-registered " in cluster.masters[0].last_lines()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TYPO, "agents.max_concurent: unknown key"),
        ("logging: {output: /missing/log}\n", "logging.output: /missing/log"),
        ("database: {type: embedded, folder: /proc/postgres}\n", "Cannot use /proc/postgres for PostgreSQL"),
    ],
    ids=["key", "log", "database"],
)
def test_a_reload_of_a_faulty_file_is_logged_and_changes_nothing(
    start_cluster: Callable[..., Cluster], text: str, reason: str, dsn: str
) -> None:
    config = f"database: {{type: postgres, dsn: '{dsn}'}}\nagents: {{max_concurrent: 2}}\n"
    cluster = start_cluster(1, config=config, env={"DATABASE_DSN": "", "DATABASE_TYPE": ""})
    (cluster.folder / "config.yaml").write_text(text)
    reload(cluster)
    assert limit(cluster.client(0)) == claims_until_busy(cluster.client(0)) == 2
    lines = map(json.loads, cluster.masters[0].log.read_text().splitlines())
    (said,) = (line for line in lines if line["event"] == "settings-kept")
    assert reason in said["reason"]


def reload(cluster: Cluster) -> None:
    """Send SIGHUP to the master, and wait until its new worker has replaced the old one."""
    former = cluster.pid(0)
    cluster.masters[0].send(signal.SIGHUP)
    wait_until(lambda: not os.path.exists(f"/proc/{former}"), 30)
    cluster.wait_healthy(1)


def test_without_gunicorn_the_application_reads_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("agents: {max_concurrent: 3}\n")
    code = "from app import app; print(app.config['LOOM'].agents.max_concurrent)"
    env = {**os.environ, "LOOM_CONFIG": str(tmp_path / "config.yaml")}
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "3\n"
    (tmp_path / "config.yaml").write_text(TYPO)
    assert "ConfigError" in subprocess.run(run, env=env, cwd=ROOT, capture_output=True, text=True, check=False).stderr


def test_two_concurrent_imports_leave_the_values_of_one(first: Client, second: Client) -> None:
    keys = [f"k{n}" for n in range(100)]
    documents = ["\n".join(f"{key}: {who}" for key in order) for who, order in (("a", keys), ("b", reversed(keys)))]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            answers = threads.map(
                lambda client, text: client.post(f"{CONFIG}/import.yaml", text.encode()), (first, second), documents
            )
            assert [answer.status for answer in answers] == [200, 200]
            assert len(set(first.get(CONFIG).json["shared"].values())) == 1
