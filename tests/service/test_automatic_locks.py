"""Assigning agents, moving beads, registering providers and configuring take their locks; no write goes unfenced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.client import Answer
from harness.entities import PROVIDERS
from harness.locks import Sql, acquire, assert_problem, force, wait_expired
from harness.work import AGENTS, BEADS, PROJECT, bead, claim, make, team

Session = Callable[[], psycopg2.extensions.connection]


class Operation(NamedTuple):
    """One that takes the lock `name` by itself, and the query that shows what it changes."""

    name: str
    method: str
    path: str
    body: Any
    state: str


AGENT = "SELECT version, project_id, status, open_claims FROM agents WHERE id = 'a'"
BEAD = "SELECT version, status, assigned_to FROM beads WHERE id = 'x'"
RESERVED = "SELECT id, assigned_to FROM beads WHERE assigned_to IS NOT NULL ORDER BY id"
CONFIG = "/api/v1/config"
SHARED = "SELECT key, value, version FROM config ORDER BY key"
PROVIDER = "SELECT version, model FROM providers WHERE id = 'new'"
OPERATIONS = [
    Operation("agent:a", "POST", "/api/v1/projects/q/agents", {"agent_id": "a"}, AGENT),
    Operation("agent:a", "PATCH", f"{AGENTS}/a", {"project_id": "q"}, AGENT),
    Operation("agent:a", "POST", f"{BEADS}/x/claim", {"agent_id": "a"}, AGENT),
    Operation("agent:a", "POST", f"{BEADS}/claim", {"agent_id": "a"}, AGENT),
    Operation("agent:a", "DELETE", f"{AGENTS}/a", None, AGENT),
    Operation("agent:a", "PATCH", f"{BEADS}/x", {"assigned_to": "a"}, BEAD),
    Operation("agent:a", "POST", BEADS, {"title": "new", "project_id": PROJECT, "assigned_to": "a"}, RESERVED),
    Operation("bead:x", "PATCH", f"{BEADS}/x", {"status": "closed"}, BEAD),
    Operation("bead:x", "PUT", f"{BEADS}/x", {"status": "blocked"}, BEAD),
    Operation("bead:x", "POST", f"{BEADS}/x/claim", {"agent_id": "a"}, BEAD),
    Operation("bead:x", "POST", f"{BEADS}/x/redispatch", {}, BEAD),
    Operation("bead:x", "DELETE", f"{BEADS}/x", None, BEAD),
    Operation("bead:x", "PATCH", f"{BEADS}/y", {"blocks": ["x"]}, BEAD),
    Operation("bead:x", "PATCH", f"{BEADS}/y", {"children": ["x"]}, BEAD),
    Operation("bead:x", "DELETE", f"{BEADS}/before", None, BEAD),
    Operation("bead:reserved", "DELETE", f"{AGENTS}/b", None, RESERVED),
    Operation("provider:new", "POST", PROVIDERS, {"id": "new", "model": "m"}, PROVIDER),
    Operation("provider:new", "POST", PROVIDERS, {"name": "new", "model": "m"}, PROVIDER),
    Operation(
        "provider:v", "PUT", f"{PROVIDERS}/v", {"model": "m"}, "SELECT version, model FROM providers WHERE id = 'v'"
    ),
    Operation("config:k", "PUT", "/api/v1/config/k", {"value": 1}, "SELECT version, value FROM config WHERE key = 'k'"),
    Operation("agent:a", "DELETE", f"{PROVIDERS}/of-a", None, "SELECT version, provider_id FROM agents WHERE id = 'a'"),
    Operation("provider:v", "DELETE", f"{PROVIDERS}/v", None, "SELECT version, model FROM providers WHERE id = 'v'"),
    Operation("config:c", "PUT", f"{CONFIG}/c", {"value": 2}, SHARED),
    Operation("config:c", "DELETE", f"{CONFIG}/c", None, SHARED),
    Operation("config:c", "POST", f"{CONFIG}/import.yaml", {"b": 1, "c": 2, "d": 3}, SHARED),
    Operation("config:agents.dead_after", "PUT", CONFIG, {"agents": {"dead_after": 30}}, SHARED),
]
each_operation = pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: f"{op.name} {op.method} {op.path[8:]}")


@pytest.fixture
def work(client: AppClient) -> AppClient:
    team(client, "a", "b")
    make(client, "/api/v1/projects", id="q", name="q", git_repo="r", branch="b")
    make(client, PROVIDERS, id="v", name="v")
    make(client, PROVIDERS, id="of-a", name="of a")
    client.patch(f"{AGENTS}/a", {"provider_id": "of-a"})
    bead(client, "before", status="closed")
    bead(client, "x", blocked_by=["before"])
    bead(client, "y", status="blocked")
    bead(client, "reserved", assigned_to="b")
    client.put(f"{CONFIG}/c", {"value": 1})
    return client


@pytest.fixture
def start(work: AppClient) -> Iterator[Callable[[Operation], Future[Answer]]]:
    """Sends a request on a thread of its own."""
    with ThreadPoolExecutor(1) as thread:
        yield lambda op: thread.submit(work.request, op.method, op.path, op.body)


@each_operation
def test_it_waits_while_another_is_at_the_same(
    sql: Sql, session: Session, op: Operation, start: Callable[[Operation], Future[Answer]]
) -> None:
    before = sql(op.state)
    with session() as other, other.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (op.name,))
        late = start(op)
        wait_until(lambda: sql("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))
        assert not late.done()
        assert sql(op.state) == before
    assert late.result().status < 300, late.result()
    assert sql(op.state) != before


@each_operation
def test_it_is_refused_while_the_lock_is_held_from_outside(work: AppClient, sql: Sql, op: Operation) -> None:
    before, events = sql(op.state), sql("SELECT count(*) FROM events")
    lock = acquire(work, op.name, owner="operator", metadata={"why": "maintenance"})
    problem = assert_problem(work.request(op.method, op.path, op.body), 409, "lock-held")
    assert problem["holder"] == {name: value for name, value in lock.items() if name != "fencing_token"}
    assert problem["holder"]["lock_name"] == op.name
    assert sql(op.state) == before
    assert sql("SELECT count(*) FROM events") == events
    own = op.name == op.path[8:].replace("s/", ":") or (op.body or {}).get("id") == "new"
    header = str(lock["fencing_token"]) + ("" if own else f'; lock="{op.name}"')
    assert work.request(op.method, op.path, op.body, {"Loom-Lock-Token": header}).status < 300
    assert sql(op.state) != before


@each_operation
def test_it_is_refused_when_the_grant_that_it_presents_has_ended(work: AppClient, sql: Sql, op: Operation) -> None:
    before, events = sql(op.state), sql("SELECT count(*) FROM events")
    for name in (op.name, "another lock"):
        lock = acquire(work, name)
        headers = {"Loom-Lock-Token": f'{lock["fencing_token"]}; lock="{name.replace(" ", "%20")}"'}
        force(work, lock["fencing_token"], name)
        problem = assert_problem(work.request(op.method, op.path, op.body, headers), 409, "lock-lost")
        assert (problem["lock_name"], problem["fencing_token"]) == (name, lock["fencing_token"])
        acquire(work, name)  # by another, and then the former token is no key to it
        assert_problem(work.request(op.method, op.path, op.body, headers), 409, "lock-lost")
        assert sql(op.state) == before
        assert sql("SELECT count(*) FROM events") == events
        sql("DELETE FROM distributed_locks")


def test_a_lock_of_another_name_fences_every_write(work: AppClient, sql: Sql) -> None:
    lock = acquire(work, "release/2026")
    headers = {"Loom-Lock-Token": f'{lock["fencing_token"]}; lock="release%2F2026"'}
    writes: list[tuple[str, str, Any]] = [
        ("POST", PROVIDERS, {"name": "w"}),
        ("POST", "/api/v1/projects", {"name": "n", "git_repo": "r", "branch": "b"}),
        ("POST", AGENTS, {"persona_name": "w", "project_id": "p"}),
        ("POST", BEADS, {"title": "t", "project_id": "p"}),
        ("POST", f"{BEADS}/bulk", {"beads": [{"title": "t", "project_id": "p"}]}),
        ("POST", f"{BEADS}/x/comments", {"content": "c"}),
        ("POST", "/api/v1/projects/p/comments", {"author_id": "a", "comment": "c"}),
        ("PATCH", "/api/v1/projects/p", {"name": "n"}),
        ("POST", "/api/v1/projects/q/agents", {"agent_id": "a"}),
        ("POST", "/api/v1/projects/q/close", {"author_id": "a"}),
        ("POST", f"{BEADS}/x/claim", {"agent_id": "a"}),
        ("POST", f"{AGENTS}/a/heartbeat", {}),
        ("DELETE", f"{BEADS}/y", None),
        ("PUT", f"{CONFIG}/c", {"value": 2}),
        ("PUT", CONFIG, {"agents": {"dead_after": 30}}),
        ("POST", f"{CONFIG}/import.yaml", {"c": 3}),
        ("DELETE", f"{CONFIG}/c", None),
    ]
    for method, path, body in writes:
        answer = work.request(method, path, body, headers)
        assert answer.status < 300, (path, answer)
    force(work, lock["fencing_token"], "release/2026")
    events = sql("SELECT count(*) FROM events")
    for method, path, body in writes:
        assert_problem(work.request(method, path, body, headers), 409, "lock-lost", lock_name="release/2026")
    assert sql("SELECT count(*) FROM events") == events


def test_an_expired_lock_holds_nothing_up(work: AppClient, sql: Sql) -> None:
    acquire(work, "bead:x", ttl_seconds=1)
    assert work.patch(f"{BEADS}/x", {"status": "closed"}).status == 409
    wait_expired(sql, "bead:x")
    assert work.patch(f"{BEADS}/x", {"status": "closed"}).status == 200


def test_automatic_locks_leave_no_trace(work: AppClient, sql: Sql) -> None:
    claim(work, "x")
    work.patch(f"{BEADS}/x", {"status": "closed"})
    assert sql("SELECT * FROM distributed_locks") == sql("SELECT * FROM grants") == []


def test_the_next_bead_is_none_that_is_locked_from_outside(work: AppClient, sql: Sql) -> None:
    acquire(work, "bead:x")
    assert work.post(f"{BEADS}/claim", {"agent_id": "a"}).status == 204


def test_a_token_without_a_name_is_refused_where_no_name_is_its_own(work: AppClient, sql: Sql) -> None:
    before = sql("SELECT count(*) FROM beads"), sql(SHARED)
    for method, path, body in (
        ("POST", f"{BEADS}/bulk", {"beads": [{"title": "t", "project_id": PROJECT}]}),
        ("PUT", CONFIG, {"agents": {"dead_after": 30}}),
    ):
        problem = assert_problem(work.request(method, path, body, {"Loom-Lock-Token": "17"}), 400, "invalid")
        assert problem["errors"][0]["field"] == "Loom-Lock-Token"
    assert (sql("SELECT count(*) FROM beads"), sql(SHARED)) == before


def test_a_holders_metadata_is_answered_as_its_owner_wrote_it(client: AppClient) -> None:
    """Its keys may be named like times: that was a 500 for everybody who wanted to change the bead."""
    team(client, "a")
    bead(client, "x")
    metadata = {"expires_at": "soon", "ended_at": {"closed_at": "never"}, "holder": {"expires_at": "x"}}
    acquire(client, "bead:x", metadata=metadata)
    refused = client.request("PATCH", f"{BEADS}/x", {"title": "t"})
    assert assert_problem(refused, 409, "lock-held")["holder"]["metadata"] == metadata
