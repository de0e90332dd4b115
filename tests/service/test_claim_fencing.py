"""A claim's token fences the agent's own writes: they commit only while the claim holds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg2
import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.client import Answer
from harness.locks import Sql, acquire, assert_problem
from harness.work import (
    AGENTS,
    BEADS,
    PROJECT,
    ask,
    assert_counted,
    assert_lost,
    bead,
    beat,
    claim,
    complete,
    fail,
    get,
    lapse,
    make,
    release,
    renew,
    team,
)

from loom import db, errors, locks
from loom.upkeep import Upkeep

Session = Callable[[], psycopg2.extensions.connection]

FENCE = "SELECT loom_fence('bead:x', %s)"
WAITING = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.fixture
def work(client: AppClient) -> AppClient:
    """A client, with the agents a and b, and the bead x."""
    team(client, "a", "b")
    bead(client, "x")
    return client


def ways_to_end(work: AppClient, sql: Sql, token: int) -> dict[str, Callable[[], object]]:
    return {
        "completed": lambda: complete(work, "x", token),
        "failed": lambda: fail(work, "x", token, retry_after_seconds=0),
        "released": lambda: release(work, "x", token),
        "changed": lambda: work.patch(f"{BEADS}/x", {"status": "open"}),
        "reassigned": lambda: work.put(f"{BEADS}/x", {"assigned_to": "b"}),
        "redispatched": lambda: work.post(f"{BEADS}/x/redispatch", {}),
        "deleted": lambda: work.delete(f"{BEADS}/x"),
        "agent deleted": lambda: work.delete(f"{AGENTS}/a"),
        "by hand": lambda: sql("UPDATE beads SET status = 'open' WHERE id = 'x'"),
    }


WAYS = (
    "completed",
    "failed",
    "released",
    "changed",
    "reassigned",
    "redispatched",
    "deleted",
    "agent deleted",
    "by hand",
)


@pytest.mark.parametrize("how", WAYS)
def test_a_write_is_refused_once_the_claim_has_ended(work: AppClient, sql: Sql, session: Session, how: str) -> None:
    token = claim(work, "x")
    with session() as conn:
        conn.cursor().execute(FENCE, (token,))
    ways_to_end(work, sql, token)[how]()
    with session() as conn, pytest.raises(psycopg2.DatabaseError, match="lock bead:x is not held") as refused:
        conn.cursor().execute(FENCE, (token,))
    assert refused.value.pgcode == "L0001"
    bead(work, "mine")
    header = {"Loom-Lock-Token": f'{token}; lock="bead:x"'}
    assert_problem(work.patch(f"{BEADS}/mine", {"title": "late"}, headers=header), 409, "lock-lost", lock_name="bead:x")
    assert get(work, "mine")["title"] == "mine"
    assert_counted(sql)


@pytest.mark.parametrize("how", WAYS)
def test_a_claim_does_not_end_while_a_transaction_that_it_fences_is_running(
    work: AppClient, sql: Sql, session: Session, how: str
) -> None:
    token = claim(work, "x")
    with session() as conn, ThreadPoolExecutor(1) as thread:
        conn.cursor().execute(FENCE, (token,))
        ending = thread.submit(ways_to_end(work, sql, token)[how])
        wait_until(lambda: ending.done() or sql(WAITING))
        assert not ending.done()
        assert sql("SELECT fencing_token FROM beads WHERE id = 'x'") == [(token,)]
        conn.commit()
        answer = ending.result()
    assert not isinstance(answer, Answer) or answer.status < 300, answer
    assert sql("SELECT fencing_token FROM beads WHERE id = 'x'") in ([(None,)], [])
    assert_counted(sql)


def test_a_bead_whose_lease_is_over_is_nobody_elses_while_its_fenced_transaction_runs(
    work: AppClient, sql: Sql, session: Session, cleaner: Upkeep
) -> None:
    token = claim(work, "x")
    with session() as conn:
        conn.cursor().execute(FENCE, (token,))
        lapse(sql, "x")
        cleaner.clean()
        assert work.post(f"{BEADS}/claim", {"agent_id": "b"}).status == 204
        assert assert_problem(ask(work, "x", "b"), 409, "bead-claimed")["holder"]["agent_id"] == "a"
        conn.commit()
    assert claim(work, "x", "b") > token
    with session() as conn, pytest.raises(psycopg2.DatabaseError, match="not held"):
        conn.cursor().execute(FENCE, (token,))
    assert_lost(complete(work, "x", token), "lapsed", "b")
    assert_counted(sql)


def test_the_agent_renews_its_claim_while_a_transaction_that_it_fences_is_running(
    work: AppClient, sql: Sql, session: Session
) -> None:
    token = claim(work, "x")
    with session() as conn:
        conn.cursor().execute(FENCE, (token,))
        assert renew(work, "x", token).status == 200
        assert ask(work, "x").json["fencing_token"] == token
        assert beat(work, claims={"x": token})["lost"] == {}
        assert work.patch(f"{BEADS}/x", {"title": "new"}).status == 200


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_an_old_snapshot_hides_no_end_of_the_claim(work: AppClient, sql: Sql, session: Session, level: str) -> None:
    token = claim(work, "x")
    with session() as conn:
        cursor = conn.cursor()
        cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        cursor.execute("SELECT 1 FROM beads")
        release(work, "x", token)
        with pytest.raises(psycopg2.DatabaseError) as refused:
            cursor.execute(FENCE, (token,))
        assert refused.value.pgcode in ("40001", "L0001")


def test_a_write_to_loom_is_fenced_by_the_claim_that_it_names(work: AppClient, sql: Sql) -> None:
    token = claim(work, "x")
    header = {"Loom-Lock-Token": f'{token}; lock="bead:x"'}
    make(work, "/api/v1/providers", id="v", name="v")
    writes = [
        ("POST", BEADS, {"id": "new", "title": "t", "project_id": PROJECT}),
        ("POST", f"{BEADS}/bulk", {"beads": [{"title": "t", "project_id": PROJECT, "blocked_by": ["x"]}]}),
        ("PATCH", f"{BEADS}/x", {"context": {"found": 1}}),
        ("PUT", "/api/v1/providers/v", {"model": "m"}),
        ("PUT", "/api/v1/config/key", {"value": 1}),
        ("POST", f"{AGENTS}/a/heartbeat", {}),
        ("POST", f"{BEADS}/x/comments", {"content": "c"}),
        ("POST", f"{BEADS}/x/complete", {"fencing_token": token}),
    ]
    for method, path, body in writes:
        assert work.request(method, path, body, header).status < 300, path
    for method, path, body in writes[1:-1]:
        assert_problem(work.request(method, path, body, header), 409, "lock-lost", lock_name="bead:x")
    assert_counted(sql)


def test_on_its_own_bead_the_token_needs_no_name(work: AppClient) -> None:
    token = claim(work, "x")
    assert work.patch(f"{BEADS}/x", {"title": "new"}, headers={"Loom-Lock-Token": str(token)}).status == 200
    release(work, "x", token)
    assert_problem(
        work.patch(f"{BEADS}/x", {"title": "old"}, headers={"Loom-Lock-Token": str(token)}), 409, "lock-lost"
    )


def test_a_claims_token_is_not_that_of_a_lock_on_the_same_name(work: AppClient) -> None:
    """Somebody else holds bead:x by name: the claim still fences, and does not open what the lock closes."""
    token = claim(work, "x")
    lock = acquire(work, "bead:x", owner="operator")
    bead(work, "mine")
    claims, named = ({"Loom-Lock-Token": f'{number}; lock="bead:x"'} for number in (token, lock["fencing_token"]))
    for header in (claims, named):
        assert work.patch(f"{BEADS}/mine", {"title": "t"}, headers=header).status == 200
    assert_problem(work.patch(f"{BEADS}/x", {"title": "t"}, headers=claims), 409, "lock-held")
    assert work.patch(f"{BEADS}/x", {"title": "t"}, headers=named).status == 200


def test_in_python_a_claims_token_is_checked_as_a_locks(work: AppClient, database: db.Database) -> None:
    token = claim(work, "x")
    with database.transaction() as conn:
        locks.check(conn, "bead:x", token)
    release(work, "x", token)
    with pytest.raises(errors.LockLost), database.transaction() as conn:
        locks.check(conn, "bead:x", token)
