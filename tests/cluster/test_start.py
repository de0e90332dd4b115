"""Instances start together on an empty database, or say in one line why they do not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Cluster, Postgres, wait_until
from harness.locks import Sql, acquire
from harness.postgres import query
from harness.processes import children

from loom.db import schema


@pytest.fixture
def empty(postgres: Postgres) -> Iterator[str]:
    """The name of an empty database."""
    name = postgres.empty_database()
    yield name
    postgres.drop(name)


def test_three_that_start_at_once_on_an_empty_database_find_each_other(
    start_cluster: Callable[..., Cluster], postgres: Postgres, empty: str
) -> None:
    cluster = start_cluster(3, dsn=postgres.dsn(empty, tcp=True))
    cluster.wait_healthy(3)
    listed = cluster.client(0).get("/api/v1/instances").json
    assert {one["metadata"]["port"] for one in listed} == set(cluster.ports)
    assert {one["metadata"]["pid"] for one in listed} == {cluster.pid(i) for i in range(3)}
    held = acquire(cluster.client(0), owner="a")
    assert cluster.client(1).get("/api/v1/locks").json == cluster.client(2).get("/api/v1/locks").json == [held]


def test_an_instance_does_not_start_on_a_newer_schema(
    start_cluster: Callable[..., Cluster], sql: Sql, dsn: str
) -> None:
    sql("UPDATE schema_version SET version = version + 1")
    with pytest.raises(AssertionError, match=f"has schema version {schema.VERSION + 1}, this Loom knows"):
        start_cluster(1)
    assert sql("SELECT 1 FROM instances") == []


def test_an_instance_that_may_not_create_tables_says_what_mends_it(
    start_cluster: Callable[..., Cluster], postgres: Postgres, empty: str
) -> None:
    if postgres.query("SELECT current_setting('server_version_num')::int < 150000") == [(True,)]:
        pytest.skip("before PostgreSQL 15 everybody may")
    postgres.query(f"CREATE ROLE user_{empty} LOGIN")
    try:
        with pytest.raises(AssertionError, match=rf"GRANT USAGE, CREATE ON SCHEMA public TO user_{empty}"):
            start_cluster(1, dsn=postgres.dsn(empty, user=f"user_{empty}"))
    finally:
        postgres.query(f"DROP ROLE user_{empty}")


def test_each_worker_of_a_gunicorn_is_an_instance_of_its_own(start_cluster: Callable[..., Cluster], dsn: str) -> None:
    cluster = start_cluster(1, config="server: {workers: 3}\n")
    cluster.wait_healthy(3)
    before = query(dsn, "SELECT instance_id, (metadata->>'pid')::int FROM instances ORDER BY 2")
    assert len({pid for _, pid in before}) == 3
    killed, pid = before[0]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: query(dsn, "SELECT status FROM instances WHERE instance_id = %s", killed) == [("dead",)], 2)
    cluster.wait_healthy(3)
    alive = {one for (one,) in query(dsn, "SELECT instance_id FROM instances WHERE status = 'active'")}
    assert {one for one, _ in before[1:]} < alive


def test_an_instance_that_is_told_to_end_leaves_nothing_in_the_registry(cluster: Cluster, sql: Sql) -> None:
    cluster.wait_healthy()
    for master in cluster.masters:
        master.stop(signal.SIGTERM)
        assert master.wait() == 0
    assert sql("SELECT 1 FROM instances") == []


def test_a_master_that_is_killed_takes_its_worker_along(cluster: Cluster, sql: Sql) -> None:
    cluster.wait_healthy()
    pid = cluster.pid(0)
    cluster.masters[0].send(signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), 10)
    wait_until(lambda: sql("SELECT count(*) FROM instances") == [(2,)])
    assert cluster.client(1).get("/health").json["active_instances"] == 2


# What a worker inherits at its fork


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.parametrize("options", ["", "--preload"])
def test_the_master_never_has_a_second_thread(
    start_cluster: Callable[..., Cluster], tmp_path: Path, options: str
) -> None:
    """Whatever is switched on: what such a thread does during a fork would stay half done in the worker for ever."""
    folder = tmp_path / "postgres"
    config = (
        f"database: {{type: embedded, folder: {folder}}}\nserver: {{workers: 2, drain_seconds: 0.1}}\n"
        "logging: {level: debug, syslog: {enabled: true, address: 'localhost:9'}}\n"
    )
    env = {"DATABASE_TYPE": "", "DATABASE_DSN": "", "GUNICORN_CMD_ARGS": options}
    cluster = start_cluster(1, config=config, env=env)
    master = cluster.master(0)
    cluster.wait_healthy(2)
    assert threads(master) == 1
    for number in (signal.SIGTTIN, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTOU):
        cluster.masters[0].send(number)
        cluster.kill(0)
        wait_until(lambda: cluster.health(0) is not None)
        assert threads(master) == 1
    wait_until(lambda: len(children(master)) == 2)
    assert "master-has-threads" not in cluster.masters[0].log.read_text()


def test_a_master_that_has_threads_says_so(start_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\nfrom app import app\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    env = {"PYTHONPATH": str(tmp_path), "GUNICORN_CMD_ARGS": "--preload"}
    cluster = start_cluster(1, app="threaded:app", env=env)
    assert '"event": "master-has-threads"' in cluster.masters[0].log.read_text()
