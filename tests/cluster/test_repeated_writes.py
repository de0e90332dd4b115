"""A write that nginx repeats is made once and answered as the first time; one that a client repeats is made again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg2.extensions
import pytest
from harness import Client, Cluster, wait_until
from harness.client import Answer
from harness.locks import Sql, assert_problem
from harness.work import BEADS, PROJECT, bead, make, team

CONFIG = "/api/v1/config/k"
FILE_LOCKS = "/api/v1/file-locks"
FILE = f"{FILE_LOCKS}/{PROJECT}/f?agent_id=a"

# Kills the worker after it has committed a request and before it answers, once each time the file DYING is created.
DYING = """
import os
import pathlib
import signal

from app import app

served = app.wsgi_app


def wsgi_app(environ, start_response):
    answer = served(environ, start_response)
    try:
        pathlib.Path(os.environ["DYING"]).unlink()
    except FileNotFoundError:
        return answer
    os.kill(os.getpid(), signal.SIGKILL)


app.wsgi_app = wsgi_app
"""


class Dying:
    """nginx in front of two instances; the one that serves a request can be killed right after its commit."""

    def __init__(self, start_cluster: Callable[..., Cluster], folder: Path) -> None:
        (folder / "dying.py").write_text(DYING)
        self._file = folder / "dying"
        env = {"PYTHONPATH": str(folder), "DYING": str(self._file)}
        self.cluster = start_cluster(2, nginx=True, app="dying:app", env=env)
        self.nginx = self.cluster.nginx_client()

    def killed(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """The answer to a request whose first instance was killed after it had committed."""
        pids = [self.cluster.pid(i) for i in range(2)]
        self._file.touch()
        answer = self.nginx.request(method, path, body, headers)
        assert not self._file.exists()
        wait_until(lambda: [self.cluster.pid(i) for i in range(2)] != pids)
        for i in range(2):
            self.cluster.wait_serving(i)
        return answer


@pytest.fixture
def dying(start_cluster: Callable[..., Cluster], tmp_path: Path) -> Dying:
    return Dying(start_cluster, tmp_path)


def lock_file(client: Client) -> Answer:
    return client.post(FILE_LOCKS, {"file_path": "f", "project_id": PROJECT, "agent_id": "a"})


def test_a_write_whose_instance_dies_right_after_the_commit_is_answered_as_applied(dying: Dying, sql: Sql) -> None:
    nginx = dying.nginx
    team(nginx, "a")
    bead(nginx, "x")
    seen = {"If-Match": '"1"', "X-Request-ID": "mine"}
    put = dying.killed("PUT", f"{BEADS}/x", {"title": "t"}, **seen)
    assert (put.status, put.json["version"], put.json["title"]) == (200, 2, "t")
    assert dying.killed("DELETE", f"{BEADS}/x", **{**seen, "If-Match": '"2"'}).status == 204
    events = sql("SELECT version, request_id FROM events WHERE entity_id = 'x' AND version > 1 ORDER BY place")
    assert events == [(2, "mine"), (3, "mine")]
    made = dying.killed("PUT", CONFIG, {"value": 1})
    assert (made.status, made.json["version"]) == (200, 1)
    assert dying.killed("DELETE", CONFIG).status == 204
    assert lock_file(nginx).status == 201
    assert dying.killed("DELETE", FILE).status == 204
    assert nginx.get(FILE_LOCKS).json == []


def test_a_write_that_nginx_repeats_while_the_first_is_still_running_is_made_once(
    start_cluster: Callable[..., Cluster], sql: Sql, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    """The instance is killed while its statement waits for a row lock; the statement goes on in the database."""
    cluster = start_cluster(2, nginx=True)
    nginx = cluster.nginx_client()
    team(nginx)
    bead(nginx, "x")
    blocker = session()
    blocker.cursor().execute("SELECT FROM beads WHERE id = 'x' FOR UPDATE")

    def waiting() -> list[str]:
        """Return the instances with a change that waits for a row lock."""
        rows = sql(
            "SELECT application_name FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND query LIKE '%enter_change%'"
        )
        return [row[0] for row in rows]

    with ThreadPoolExecutor(1) as threads:
        put = threads.submit(nginx.put, f"{BEADS}/x", {"title": "t"}, headers={"If-Match": '"1"'})
        (first,) = wait_until(waiting)
        cluster.kill(cluster.ports.index(int(first.removeprefix("loom:"))))
        wait_until(lambda: len(waiting()) == 2)
        blocker.rollback()
        answer = put.result(10)
    assert (answer.status, answer.json["version"]) == (200, 2)
    assert sql("SELECT count(*) FROM events WHERE entity_id = 'x'") == [(2,)]


def test_a_client_that_reuses_a_request_id_has_every_write_applied(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(2, nginx=True)
    team(cluster.client(0), "a")
    mine = {"X-Request-ID": "my-whole-work"}
    for client in (cluster.client(0), cluster.nginx_client()):
        for _ in range(2):
            make(client, BEADS, id="x", title="x", project_id=PROJECT)
            for version, who, title in ((2, mine, "mine"), (3, {}, "theirs"), (4, mine, "mine")):
                put = client.put(f"{BEADS}/x", {"title": title}, headers=who)
                assert (put.status, put.json["version"], put.json["title"]) == (200, version, title)
            assert client.delete(f"{BEADS}/x", headers=mine).status == 204
            assert client.get(f"{BEADS}/x").status == 404
            assert_problem(client.delete(f"{BEADS}/x", headers=mine), 404, "not-found")
            assert lock_file(client).status == 201
            assert client.delete(FILE, headers=mine).status == 204
            assert client.get(FILE_LOCKS).json == []
            assert client.put(CONFIG, {"value": 1}, headers=mine).json["version"] == 1
            assert client.put(CONFIG, {"value": 2}).json["version"] == 2
            assert client.put(CONFIG, {"value": 1}, headers=mine).json["version"] == 3
            assert client.delete(CONFIG, headers=mine).status == 204
            assert_problem(client.get(CONFIG), 404, "not-found")


@pytest.mark.parametrize("header", ["Loom-Proxy-Request-ID", "loom_proxy_request_id", "Loom_Proxy-Request_ID"])
def test_a_client_cannot_choose_the_id_by_which_nginx_marks_its_request(
    start_cluster: Callable[..., Cluster], sql: Sql, header: str
) -> None:
    cluster = start_cluster(1, nginx=True)
    nginx = cluster.nginx_client()
    team(nginx, "a")
    chosen = {header: "chosen"}
    for _ in range(2):
        assert lock_file(nginx).status == 201
        assert nginx.delete(FILE, headers=chosen).status == 204
        assert nginx.get(FILE_LOCKS).json == []
    for n in range(1, 4):
        assert nginx.put(CONFIG, {"value": 1}, headers=chosen).json["version"] == n
    ids = [row[0] for row in sql("SELECT proxy_request_id FROM events UNION ALL SELECT proxy_request_id FROM grants")]
    assert len(set(ids)) == len(ids)
    assert all(len(each) == 32 for each in ids), ids
