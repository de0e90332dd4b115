"""Instances start together on an empty database, or say in one line why they do not."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Client, Cluster, Postgres, wait_until
from harness.client import Answer
from harness.contract import document
from harness.locks import Sql, acquire
from harness.postgres import query
from harness.processes import children
from harness.work import bead, claim, team

from loom.db import schema


@pytest.fixture
def empty(postgres: Postgres) -> Iterator[str]:
    """The name of an empty database."""
    name = postgres.empty_database()
    yield name
    postgres.drop(name)


def test_three_instances_that_start_at_once_on_an_empty_database_find_each_other(
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


def test_an_instance_that_may_not_create_tables_prints_the_grant_that_it_needs(
    start_cluster: Callable[..., Cluster], postgres: Postgres, empty: str
) -> None:
    if postgres.query("SELECT current_setting('server_version_num')::int < 150000") == [(True,)]:
        pytest.skip("before PostgreSQL 15 every role may create tables")
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
    wait_until(lambda: query(dsn, "SELECT status FROM instances WHERE instance_id = %s", killed) == [("dead",)])
    cluster.wait_healthy(3)
    alive = {one for (one,) in query(dsn, "SELECT instance_id FROM instances WHERE status = 'active'")}
    assert {one for one, _ in before[1:]} < alive


def test_an_instance_that_is_told_to_stop_removes_its_row(cluster: Cluster, sql: Sql) -> None:
    cluster.wait_healthy()
    for master in cluster.masters:
        master.stop(signal.SIGTERM)
        assert master.wait() == 0
    assert sql("SELECT 1 FROM instances") == []


def test_the_worker_of_a_killed_master_leaves(cluster: Cluster, sql: Sql) -> None:
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
    """With every option on. What a second thread does during a fork stays half done in the worker for ever."""
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


def test_a_master_with_threads_is_logged(start_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\nfrom app import app\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    env = {"PYTHONPATH": str(tmp_path), "GUNICORN_CMD_ARGS": "--preload"}
    cluster = start_cluster(1, app="threaded:app", env=env)
    assert '"event":"master-has-threads"' in cluster.masters[0].log.read_text()


WITH_MODULES = """
import json, sys
from app import app as loom

def app(environ, start_response):
    if environ["PATH_INFO"] != "/modules":
        return loom(environ, start_response)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(sorted(sys.modules)).encode()]
"""


def test_no_request_imports_a_module(start_cluster: Callable[..., Cluster], tmp_path: Path, sql: Sql) -> None:
    (tmp_path / "with_modules.py").write_text(WITH_MODULES)
    cluster = start_cluster(1, app="with_modules:app", env={"PYTHONPATH": str(tmp_path)}, config="server: {threads: 4}")
    client = cluster.client(0)
    before = set(client.get("/modules").json)
    statuses = {answer.status for answer in all_kinds_of_requests(client)}
    sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'loom:%%'")
    wait_until(lambda: client.get("/api/v1/locks").status == 200)
    assert set(client.get("/modules").json) - before == set()
    assert statuses >= {200, 201, 204, 304, 400, 404, 405, 409, 412, 413}


def all_kinds_of_requests(client: Client) -> Iterator[Answer]:
    """Call each operation of the contract with valid and invalid requests, and some with special ones."""
    team(client, "a", "b")
    for key in ("x", "y", "z"):
        bead(client, key, **({"blocked_by": ["x"]} if key == "y" else {}))
    token = claim(client, "x")
    lock = acquire(client, owner="a")
    held = f"/api/v1/locks/{lock['lock_name']}"
    yield client.put(held, {"fencing_token": lock["fencing_token"]})
    yield client.post(held, {"wait_seconds": 1})
    yield client.post("/api/v1/beads/x/complete", {"fencing_token": token}, headers={"Idempotency-Key": "k"})
    yield client.post("/api/v1/beads/x/complete", {"fencing_token": token}, headers={"Idempotency-Key": "k"})
    yield client.delete(f"{held}?fencing_token={lock['fencing_token']}")
    yield client.patch("/api/v1/beads/z", {"title": "t", "priority": 1}, headers={"If-Match": '"99"'})
    yield client.post("/api/v1/config/import.yaml", "a: ü\nb: [1, 2.5, 2026-01-01, !!binary eA==]\n".encode())
    yield client.post("/api/v1/config/import.yaml", b"\xef\xbb\xbfa: {b: c}\n")
    yield client.get("/api/openapi.yaml", headers={"If-None-Match": client.get("/api/openapi.yaml").headers["ETag"]})
    yield client.get("/api/v1/events?after=0&wait_seconds=1")
    yield client.get("/api/v1/locks/%C3%BC%20%F0%9F%94%92", headers={"Host": "b\u00fccher.example"})
    for path, item in document()["paths"].items():
        there = re.sub(r"\{[a-z_]+\}", "a", path)
        for method in (*item.keys() - {"parameters"}, "head", "options", "trace"):
            for body in (None, {}, b"{", b"\xff", b"[" * 10_000, {"a": "\0"}, {"value": 1e300, "agent_id": "a"}):
                yield client.request(method.upper(), there, body)
        yield client.get(f"{there}?limit=x&after=%FF&x=1")
    yield client.post("/api/v1/locks/x", b"x" * 2_000_000)
