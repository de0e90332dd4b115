"""A closed project has no work left, and gets none until it is reopened."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.client import Answer
from harness.entities import PROJECTS
from harness.locks import Sql, acquire, assert_problem
from harness.work import BEADS, PROJECT, assert_counted, bead, claim, complete, fail, make, patch, team

Session = Callable[[], psycopg2.extensions.connection]

Q = "q"  # the project that is closed
AUTHOR = {"author_id": "ann"}
# Each brings an open bead into Q, where `done` is a closed bead; `mover` is one of another project.
BY_HAND = {
    "create": "INSERT INTO beads (id, title, project_id) VALUES ('new', 't', 'q')",
    "move": "UPDATE beads SET project_id = 'q' WHERE id = 'mover'",
    "reopen": "UPDATE beads SET status = 'open' WHERE id = 'done'",
}


@pytest.fixture
def work(client: AppClient) -> AppClient:
    """A client, with the agent a, the projects p and q, and a bead in each; that of q is closed."""
    team(client, "a")
    make(client, PROJECTS, id=Q, name="q", git_repo="r", branch="main")
    bead(client, "mover")
    bead(client, "done", project_id=Q, status="closed")
    return client


def close(client: AppClient, key: str = Q, **more: Any) -> Answer:
    return client.post(f"{PROJECTS}/{key}/close", {**AUTHOR, **more})


def reopen(client: AppClient, key: str = Q, **more: Any) -> Answer:
    return client.post(f"{PROJECTS}/{key}/reopen", {**AUTHOR, **more})


def assert_not_ready(answer: Answer, *issues: str) -> None:
    assert assert_problem(answer, 409, "conflict")["readiness_issues"] == list(issues)


def waits_for_a_lock(sql: Sql) -> bool:
    return bool(sql("SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"))


def new(key: str, **fields: Any) -> dict[str, Any]:
    return {"id": key, "title": key, "project_id": Q, **fields}


def test_a_closed_project_takes_no_beads_until_it_is_reopened(work: AppClient, sql: Sql) -> None:
    writes: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", BEADS, new("x")),
        ("POST", BEADS, new("y", status="closed")),
        ("POST", f"{BEADS}/bulk", {"beads": [new("z1", project_id=PROJECT), new("z2")]}),
        ("PATCH", f"{BEADS}/mover", {"project_id": Q}),
        *(("PATCH", f"{BEADS}/done", {"status": status}) for status in ("open", "in_progress", "blocked")),
        ("PUT", f"{BEADS}/done", {"status": "open"}),
        ("POST", f"{BEADS}/done/redispatch", {}),
    ]
    assert close(work).status == 200
    before = sql("SELECT count(*) FROM events")
    for method, path, body in writes:
        problem = assert_problem(work.request(method, path, body), 409, "project-closed", project_id=Q)
        assert Q in problem["detail"]
    assert sql("SELECT count(*) FROM events") == before
    assert reopen(work).json["status"] == "reopened"
    for method, path, body in writes:
        assert work.request(method, path, body).status in (200, 201), (path, body)
    assert_counted(sql)


@pytest.mark.parametrize("write", BY_HAND.values(), ids=BY_HAND)
def test_by_hand_a_closed_project_takes_no_beads_either(work: AppClient, sql: Sql, write: str) -> None:
    sql("UPDATE projects SET status = 'closed' WHERE id = 'q'")
    with pytest.raises(psycopg2.DatabaseError, match="project q is closed") as refused:
        sql(write)
    assert refused.value.pgcode == "L0005"
    sql("UPDATE projects SET status = 'open' WHERE id = 'q'")
    sql(write)
    assert_counted(sql)


def test_comments_agents_and_edits_are_still_accepted_in_a_closed_project(work: AppClient) -> None:
    assert close(work).status == 200
    patch(work, "done", title="renamed", tags=["t"])
    assert work.post(f"{BEADS}/done/comments", {"content": "c"}).status == 201
    assert work.post(f"{PROJECTS}/{Q}/comments", {**AUTHOR, "comment": "c"}).status == 201
    assert work.post(f"{PROJECTS}/{Q}/agents", {"agent_id": "a"}).status == 200
    patch(work, "done", project_id=PROJECT)
    assert work.delete(f"{BEADS}/done").status == 204


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_a_person_may_close_a_project_over_its_open_beads_which_can_be_finished(
    work: AppClient, sql: Sql, method: str
) -> None:
    for key in ("one", "two"):
        bead(work, key, project_id=Q)
    token = claim(work, "one")
    assert work.request(method, f"{PROJECTS}/{Q}", {"status": "closed"}).json["status"] == "closed"
    assert fail(work, "one", token, retry_after_seconds=0).json["status"] == "open"
    for key in ("one", "two"):
        assert complete(work, key, claim(work, key)).status == 200
    assert_problem(work.patch(f"{BEADS}/one", {"status": "open"}), 409, "project-closed", project_id=Q)
    assert_counted(sql)


def test_a_project_with_open_beads_is_not_closed_and_the_answer_says_why(work: AppClient, sql: Sql) -> None:
    for n, status in enumerate(("open", "in_progress", "blocked")):
        bead(work, f"x{n}", project_id=Q, status=status)
    work.patch(f"{PROJECTS}/{Q}", {"is_perpetual": True})
    before = work.get(f"{PROJECTS}/{Q}").body
    assert_not_ready(close(work, comment="c"), "3 beads are not closed", "the project is perpetual")
    assert work.get(f"{PROJECTS}/{Q}").body == before, "no comment either"
    work.patch(f"{PROJECTS}/{Q}", {"is_perpetual": False})
    for n in range(3):
        assert_not_ready(close(work), f"{3 - n} beads are not closed")
        patch(work, f"x{n}", status="closed")
    held = acquire(work, f"project:{Q}", owner="operator")
    assert_problem(close(work), 409, "lock-held")
    mine = {"Loom-Lock-Token": str(held["fencing_token"])}
    answer = work.post(f"{PROJECTS}/{Q}/close", {**AUTHOR, "comment": "c"}, headers=mine)
    assert answer.status == 200
    assert [each["comment"] for each in work.get(f"{PROJECTS}/{Q}/comments").json] == ["c"]
    assert answer.headers["ETag"] == f'"{answer.json["version"]}"'
    assert_problem(close(work, "none"), 404, "not-found")
    assert_problem(reopen(work, "none"), 404, "not-found")
    assert_counted(sql)


@pytest.mark.parametrize("write", BY_HAND.values(), ids=BY_HAND)
def test_closing_waits_for_a_bead_that_is_written_at_the_same_time(
    work: AppClient, sql: Sql, session: Session, write: str
) -> None:
    with ThreadPoolExecutor(1) as thread, session() as conn:
        conn.cursor().execute(write)
        closing = thread.submit(close, work)
        wait_until(lambda: closing.done() or waits_for_a_lock(sql))
        conn.commit()
        assert_not_ready(closing.result(), "1 beads are not closed")
    sql("UPDATE beads SET status = 'closed' WHERE project_id = 'q'")
    assert close(work).status == 200


@pytest.mark.parametrize("write", BY_HAND.values(), ids=BY_HAND)
@pytest.mark.parametrize(
    "closing",
    [
        "SELECT outcome FROM close_project('q', NULL)",
        "UPDATE projects SET status = 'closed' WHERE id = 'q'",
    ],
    ids=["close", "by hand"],
)
def test_a_bead_that_is_written_while_its_project_is_closed_is_refused(
    work: AppClient, sql: Sql, session: Session, closing: str, write: str
) -> None:
    with ThreadPoolExecutor(1) as thread, session() as conn:
        conn.cursor().execute(closing)
        writing = thread.submit(sql, write)
        wait_until(lambda: writing.done() or waits_for_a_lock(sql))
        conn.commit()
        with pytest.raises(psycopg2.DatabaseError, match="project q is closed"):
            writing.result()


def test_a_closing_that_is_undone_refuses_no_bead(work: AppClient, sql: Sql, session: Session) -> None:
    with ThreadPoolExecutor(1) as thread, session() as conn:
        conn.cursor().execute("SELECT outcome FROM close_project('q', NULL)")
        creating = thread.submit(work.post, BEADS, new("x"))
        wait_until(lambda: creating.done() or waits_for_a_lock(sql))
        conn.rollback()
        assert creating.result().status == 201


def test_no_bead_is_written_late_into_a_project_that_a_person_has_closed(
    work: AppClient, sql: Sql, session: Session
) -> None:
    with ThreadPoolExecutor(1) as thread, session() as conn:
        conn.cursor().execute(BY_HAND["create"])
        closing = thread.submit(work.put, f"{PROJECTS}/{Q}", {"status": "closed"})
        wait_until(lambda: closing.done() or waits_for_a_lock(sql))
        assert not closing.done()
        conn.commit()
        assert closing.result().status == 200


def test_an_uncommitted_bead_makes_no_other_writer_of_its_project_wait(work: AppClient, session: Session) -> None:
    with session() as conn:
        for write in BY_HAND.values():
            conn.cursor().execute(write)
        assert work.post(BEADS, new("x")).status == 201
        assert work.post(f"{BEADS}/bulk", {"beads": [new("y"), new("z")]}).status == 201
        assert work.patch(f"{PROJECTS}/{Q}", {"description": "d"}).status == 200
        assert_not_ready(close(work), "3 beads are not closed")  # what is committed is enough to refuse it at once


def test_when_closing_a_project_races_with_a_new_bead_one_of_them_is_refused(
    work: AppClient, sql: Sql, session: Session, seed: int, long: bool
) -> None:
    """The bead is created, moved or reopened, by HTTP or by hand: either closing counts it, or it is refused."""
    chance = random.Random(seed)
    orders: Counter[tuple[str, str]] = Counter()
    by_hand = session()
    by_hand.autocommit = True
    writes: dict[str, Callable[[str], bool]] = {
        "create": lambda q: accepted(work.post(BEADS, new(f"new-{q}", project_id=q)), 201, q),
        "bulk": lambda q: accepted(work.post(f"{BEADS}/bulk", {"beads": [new(f"new-{q}", project_id=q)]}), 201, q),
        "move": lambda q: accepted(work.patch(f"{BEADS}/mover-{q}", {"project_id": q}), 200, q),
        "reopen": lambda q: accepted(work.patch(f"{BEADS}/done-{q}", {"status": "open"}), 200, q),
        "by hand": lambda q: inserted(by_hand, q),
    }
    lead = dict.fromkeys(writes, 0.0)  # seconds by which closing begins earlier: what came second gets more
    for n in range(2000 if long else 100):
        how = list(writes)[n % len(writes)]
        q = f"q{n}"
        sql("INSERT INTO projects (id, name) VALUES (%s, %s)", q, q)
        bead(work, f"done-{q}", project_id=q, status="closed")
        bead(work, f"mover-{q}")
        begin = threading.Barrier(2)
        ahead = lead[how] + chance.uniform(-0.001, 0.001)

        def closed(q: str = q, begin: threading.Barrier = begin, ahead: float = ahead) -> Answer:
            begin.wait()
            time.sleep(max(0, -ahead))
            return close(work, q, comment="c")

        with ThreadPoolExecutor(1) as thread:
            closing = thread.submit(closed)
            begin.wait()
            time.sleep(max(0, ahead))
            taken = writes[how](q)
        if closing.result().status != 200:
            assert_not_ready(closing.result(), "1 beads are not closed")
        found = sql(
            "SELECT p.status, count(b.id), count(b.id) FILTER (WHERE b.status <> 'closed')"
            "  FROM projects p LEFT JOIN beads b ON b.project_id = p.id WHERE p.id = %s GROUP BY 1",
            q,
        )
        assert (closing.result().status == 200) is not taken, (how, n)
        in_project = 2 if taken and how != "reopen" else 1
        assert found == [("open" if taken else "closed", in_project, int(taken))], (how, n)
        orders[how, "bead first" if taken else "closed first"] += 1
        lead[how] += 0.001 if taken else -0.001
    print(sorted(orders.items()))
    assert len(orders) == 2 * len(writes), "both orders of each"
    assert_counted(sql)
    assert sql("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


def accepted(answer: Answer, status: int, project: str) -> bool:
    if answer.status == status:
        return True
    assert_problem(answer, 409, "project-closed", project_id=project)
    return False


def inserted(conn: psycopg2.extensions.connection, project: str) -> bool:
    try:
        conn.cursor().execute(
            "INSERT INTO beads (id, title, project_id) VALUES (%s, 't', %s)", (f"new-{project}", project)
        )
    except psycopg2.DatabaseError as exc:
        if exc.pgcode != "L0005":
            raise
        return False
    return True
