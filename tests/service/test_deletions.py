"""Deletions that touch many others: in steps, which lock few names each, and never half told."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2.extensions
import pytest
from harness import AppClient
from harness.client import Answer
from harness.entities import PROJECTS, PROVIDERS
from harness.locks import Sql, acquire, assert_problem
from harness.work import (
    AGENTS,
    BEADS,
    COUNTED,
    PROJECT,
    assert_counted,
    bead,
    claim,
    get,
    make,
    patch,
    seed_beads,
    team,
)

from loom.bounds import bounds

Session = Callable[[], psycopg2.extensions.connection]

MANY = 3 * bounds.names + 50
ADVISORY = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"


@pytest.fixture
def work(client: AppClient) -> AppClient:
    """A client, with the project p, its agent a, and the project q with the agent b."""
    team(client, "a")
    make(client, PROJECTS, id="q", name="q", git_repo="r", branch="main")
    make(client, AGENTS, id="b", persona_name="w", project_id="q")
    return client


def deleted(client: AppClient, path: str) -> Answer:
    """Delete, again while it is said to be done in part."""
    deadline = time.monotonic() + 60
    while (answer := client.delete(path)).status == 503 and time.monotonic() < deadline:
        assert "send it again" in answer.json["detail"]
        assert answer.headers["Retry-After"]
    return answer


def most_locks(sql: Sql, call: Callable[[], Answer]) -> tuple[Answer, int]:
    """The answer, and the greatest number of advisory locks that was seen meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(call)
        most = 0
        while not answer.done():
            most = max(most, sql(ADVISORY)[0][0])
    return answer.result(), most


def assert_counters(sql: Sql) -> None:
    assert [row for query in COUNTED[:4] for row in sql(query)] == []


def assert_changed_once(sql: Sql, kind: str, count: int) -> None:
    """Each of the seeded entities has one event: of its change, or of its deletion."""
    events = "SELECT count(*), count(DISTINCT entity_id) FROM events WHERE entity_type = %s AND version = 2"
    assert sql(events, kind) == [(count, count)]


def test_an_agent_with_very_many_reserved_beads_is_deleted(work: AppClient, sql: Sql) -> None:
    """It was 503 for ever, and others were refused meanwhile: each name took a place in the shared lock table."""
    seed_beads(sql, 25_000, key="'r' || n", assigned_to="'b'")
    bead(work, "mine")
    claim(work, "mine", "b")
    answer, most = most_locks(sql, lambda: deleted(work, f"{AGENTS}/b"))
    assert answer.status == 204, answer
    assert most <= bounds.names + 10
    assert sql("SELECT count(*) FROM beads WHERE assigned_to = 'b'") == [(0,)]
    assert get(work, "mine")["status"] == "open"
    assert sql("SELECT count(*) FROM events WHERE entity_type = 'bead' AND version = 2 AND entity_id LIKE 'r%'") == [
        (25_000,)
    ]
    assert_counters(sql)


@pytest.mark.parametrize("columns", [{"blocked_by": "'{x}'"}, {"parent": "'x'"}], ids=["blocker", "parent"])
def test_a_bead_that_very_many_name_is_deleted(work: AppClient, sql: Sql, columns: dict[str, str]) -> None:
    bead(work, "x")
    seed_beads(sql, MANY, **columns)
    answer, most = most_locks(sql, lambda: deleted(work, f"{BEADS}/x"))
    assert answer.status == 204, answer
    assert most <= bounds.names + 10
    assert sql("SELECT count(*) FROM beads WHERE blocked_by = '{}' AND parent IS NULL AND open_blockers = 0") == [
        (MANY,)
    ]
    assert_changed_once(sql, "bead", MANY + 1)
    assert_counters(sql)


def test_a_bead_with_very_many_comments_is_deleted(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    bead(work, "y", project_id="q")
    for key in "xy":
        sql(
            "INSERT INTO comments (id, parent_id, entity_type, entity_id, project_id, content)"
            " SELECT %s || n, CASE WHEN n > 1 THEN %s || n - 1 END, 'bead', %s, 'p', 'c'"
            "   FROM generate_series(1, 2500) AS n",
            *(key, key, key),
        )
    assert deleted(work, f"{BEADS}/x").status == 204
    assert deleted(work, f"{PROJECTS}/q").status == 204
    assert sql("SELECT count(*) FROM comments") == [(0,)]
    assert_counted(sql)


def test_a_provider_of_very_many_agents_is_deleted(work: AppClient, sql: Sql) -> None:
    make(work, PROVIDERS, id="v", name="v")
    sql(
        "SET session_replication_role = replica; INSERT INTO agents (id, name, project_id, provider_id)"
        " SELECT 'v' || n, 'n', 'p', 'v' FROM generate_series(1, %s) n",
        MANY,
    )
    answer, most = most_locks(sql, lambda: deleted(work, f"{PROVIDERS}/v"))
    assert answer.status == 204, answer
    assert most <= bounds.names + 10
    assert_changed_once(sql, "agent", MANY)


def test_a_stale_deletion_changes_nothing(work: AppClient, sql: Sql) -> None:
    seed_beads(sql, MANY, blocked_by="CASE WHEN n > 0 THEN '{b0}'::text[] ELSE '{}' END", assigned_to="'a'")
    before = sql("SELECT count(*) FROM events")
    for path in (f"{BEADS}/b0", f"{AGENTS}/a", f"{PROJECTS}/p"):
        assert work.delete(path, headers={"If-Match": '"7"'}).status == 412
        assert_problem(work.delete(path, headers={"Loom-Lock-Token": "7"}), 409, "lock-lost")
        name = path.removeprefix("/api/v1/").replace("s/", ":")
        lock = acquire(work, name)
        assert_problem(work.delete(path), 409, "lock-held")
        assert work.delete(f"/api/v1/locks/{name}?fencing_token={lock['fencing_token']}").status == 204
    assert sql("SELECT count(*) FROM events") == before


# Projects


def test_a_deleted_projects_agents_live_on_and_its_beads_go_each_with_its_event(work: AppClient, sql: Sql) -> None:
    for key in "cde":
        bead(work, key, project_id="q", priority=4)
    bead(work, "outside", blocked_by=["c", "d"], parent="e")
    bead(work, "inside", project_id="q", blocked_by=["outside", "c"], assigned_to="b")
    patch(work, "d", status="closed")
    claim(work, bead(work, "elsewhere")["id"], "b")
    assert work.post(f"{BEADS}/c/comments", {"content": "c"}).status == 201
    assert work.delete(f"{PROJECTS}/q", headers={"Loom-Actor": "ann"}).status == 204
    assert work.get(f"{PROJECTS}/q").status == 404
    gone = sql("SELECT entity_id, actor, project_id FROM events WHERE type = 'bead.deleted' ORDER BY 1")
    assert gone == [(key, "ann", "q") for key in ("c", "d", "e", "inside")]
    agent = work.get(f"{AGENTS}/b").json
    assert ("project_id" in agent and agent["project_id"], agent["current_bead"]) == (None, "elsewhere")
    assert {"blocked_by", "parent", "children"}.isdisjoint(get(work, "outside"))
    assert claim(work, "outside")
    assert_counted(sql)


def test_a_project_with_a_bead_in_progress_is_not_deleted(work: AppClient, sql: Sql) -> None:
    bead(work, "x", project_id="q")
    bead(work, "y", project_id="q")
    token = claim(work, "y", "b")
    before = sql("SELECT count(*) FROM events")
    problem = assert_problem(work.delete(f"{PROJECTS}/q"), 409, "in-use", used_by="beads", bead_id="y")
    assert "y" in problem["detail"]
    assert sql("SELECT count(*) FROM events") == before
    assert work.delete(f"{BEADS}/y/claim?fencing_token={token}").status == 204
    make(work, PROJECTS, id="child", name="child", git_repo="r", branch="main", parent_id="q")
    assert_problem(work.delete(f"{PROJECTS}/q"), 409, "in-use", used_by="projects")
    assert get(work, "x")
    assert work.delete(f"{PROJECTS}/child").status == 204
    assert work.delete(f"{PROJECTS}/q").status == 204
    assert_counted(sql)


def test_a_project_with_very_many_beads_is_deleted(work: AppClient, sql: Sql) -> None:
    blocked_by = "CASE WHEN n > 0 THEN ARRAY['b0', 'b' || n - 1] ELSE '{}' END"
    seed_beads(sql, MANY, blocked_by, project_id="'q'")
    seed_beads(sql, MANY, "'{b0,b1}'", key="'outside' || n")
    answer, most = most_locks(sql, lambda: deleted(work, f"{PROJECTS}/q"))
    assert answer.status == 204, answer
    assert most <= bounds.names + 10
    assert sql("SELECT count(*) FROM events WHERE type = 'bead.deleted'") == [(MANY,)]
    assert sql("SELECT count(*) FROM beads WHERE open_blockers = 0 AND blocked_by = '{}'") == [(MANY,)]
    assert_counters(sql)


def test_a_bead_that_is_created_while_its_project_is_deleted_is_in_no_project_that_is_gone(
    work: AppClient, sql: Sql
) -> None:
    for n in range(20):
        make(work, PROJECTS, id=f"q{n}", name="q", git_repo="r", branch="main")
        with ThreadPoolExecutor(3) as threads:
            new = [{"id": f"x{n}-{m}", "title": "t", "project_id": f"q{n}"} for m in range(2)]
            created = list(threads.map(lambda body: threads.submit(work.post, BEADS, body), new))
            gone = threads.submit(work.delete, f"{PROJECTS}/q{n}")
            assert gone.result().status == 204
            assert {answer.result().status for answer in created} <= {201, 400}
    assert sql("SELECT id FROM beads") == []
    assert_counted(sql)


# Files


def test_an_agent_with_very_many_file_locks_is_deleted(work: AppClient, sql: Sql) -> None:
    sql(
        "INSERT INTO distributed_locks"
        " SELECT 'file:p:' || n, NULL, 'agent:b', n, now(), now() + INTERVAL '1 hour', now()"
        "   FROM generate_series(1, 2500) AS n"
    )
    assert deleted(work, f"{AGENTS}/b").status == 204
    assert sql("SELECT count(*), min(ended_how), max(ended_how) FROM grants") == [(2500, "released", "released")]


def test_a_deleted_agents_files_are_free_at_once(work: AppClient, sql: Sql, session: Session) -> None:
    """Also one that fences a transaction: it is free when that has ended."""
    locks = "/api/v1/file-locks"

    def take(path: str, agent: str) -> Answer:
        return work.post(locks, {"file_path": path, "project_id": PROJECT, "agent_id": agent})

    taken = {path: take(path, "b").json for path in ("one.py", "two.py")}
    assert take("one.py", "a").status == 409
    with session() as conn:
        fenced: dict[str, Any] = taken["two.py"]
        conn.cursor().execute("SELECT loom_fence(%s, %s)", (fenced["lock_name"], fenced["fencing_token"]))
        assert work.delete(f"{AGENTS}/b").status == 204
        assert take("one.py", "a").status == 201
        assert take("two.py", "a").status == 409
        conn.commit()
    assert take("two.py", "a").status == 201
    assert sql("SELECT ended_how FROM grants WHERE owner = 'agent:b' ORDER BY lock_name") == [
        ("released",),
        ("expired",),
    ]
