"""Large graphs of beads: a check for cycles ends soon, and what many beads wait for can still be completed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.client import Answer
from harness.locks import Sql, assert_problem
from harness.work import (
    BEADS,
    COUNTED,
    PROJECT,
    assert_counted,
    bead,
    claim,
    complete,
    get,
    patch,
    seed_beads,
    team,
)

from loom.bounds import bounds

Session = Callable[[], psycopg2.extensions.connection]

BULK = BEADS + "/bulk"
SIZE = 10_000
FAST = 2.0  # seconds, on a machine that is busy with other tests; a graph whose paths are counted takes for ever
# The beads that b<n> waits for, in graphs of SIZE beads; b0 waits for none, and the last ones for all others.
SHAPES = {
    "chain": "CASE WHEN n > 0 THEN ARRAY['b' || n - 1] ELSE '{}' END",
    "ladder": "CASE WHEN n > 1 THEN ARRAY['b' || (n / 2 * 2 - 2), 'b' || (n / 2 * 2 - 1)] ELSE '{}' END",
    "diamonds": "CASE WHEN n = 0 THEN '{}' WHEN n % 3 = 0 THEN ARRAY['b' || n - 2, 'b' || n - 1]"
    " ELSE ARRAY['b' || n / 3 * 3] END",
    "layers": "CASE WHEN n >= 20 THEN ARRAY(SELECT 'b' || m FROM generate_series(n / 20 * 20 - 20, n / 20 * 20 - 1) m)"
    " ELSE '{}' END",
}


@pytest.fixture
def work(client: AppClient) -> AppClient:
    """A client, with a project and the agent a."""
    team(client, "a")
    return client


def timed(call: Callable[[], Answer]) -> tuple[Answer, float]:
    began = time.monotonic()
    answer = call()
    return answer, time.monotonic() - began


def assert_counters(sql: Sql) -> None:
    assert [row for query in COUNTED[:4] for row in sql(query)] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dependency_in_a_graph_of_ten_thousand_beads_is_checked_soon(work: AppClient, sql: Sql, shape: str) -> None:
    seed_beads(sql, SIZE, SHAPES[shape])
    bead(work, "alone")
    bead(work, "above", blocked_by=[f"b{SIZE - 1}"])
    bead(work, "top", blocked_by=["above"])
    first, middle, last = "b0", f"b{SIZE // 2}", f"b{SIZE - 1}"
    for key, more in (("above", first), ("top", last), (middle, "alone"), (first, "alone")):
        blocked_by = [*get(work, key).get("blocked_by", ()), more]
        answer, took = timed(lambda key=key, to=blocked_by: work.patch(f"{BEADS}/{key}", {"blocked_by": to}))
        assert answer.status == 200, answer
        assert took < FAST, (key, took)
    for key, fields in (
        (first, {"blocked_by": [last]}),
        (first, {"blocked_by": ["top"]}),
        (last, {"blocks": [first]}),
        (first, {"parent": "alone", "children": [last]}),
    ):
        answer, took = timed(lambda key=key, fields=fields: work.patch(f"{BEADS}/{key}", fields))
        cycle = assert_problem(answer, 409, "cycle")["cycle"]
        assert cycle[0] == cycle[-1]
        assert len(set(cycle)) == len(cycle) - 1
        waits = dict(sql("SELECT id, blocked_by FROM beads WHERE id = ANY (%s)", cycle))
        assert sum(after not in waits[before] for before, after in pairwise(cycle)) == 1, (
            "all but the one that was refused"
        )
        assert took < FAST, (key, took)
    assert_counters(sql)


def test_nothing_is_visited_when_nobody_waits_for_the_bead(work: AppClient, sql: Sql) -> None:
    """Under layers whose every further edge took seconds, the edge to the top costs what any other change costs."""
    seed_beads(sql, 1600, SHAPES["layers"].replace("20", "200"))
    bead(work, "top")
    for blocked_by in (["b1599"], [], [f"b{n}" for n in range(1400, 1600)]):
        answer, took = timed(lambda to=blocked_by: work.patch(f"{BEADS}/top", {"blocked_by": to}))
        assert answer.status == 200
        assert took < FAST / 2
    assert_counters(sql)


def test_a_check_beyond_its_bound_is_refused_with_the_number(work: AppClient, sql: Sql) -> None:
    seed_beads(sql, 60_000, SHAPES["chain"])
    for fields in ({"blocked_by": ["b29999", "b5"]}, {"children": ["b7"]}):
        answer, took = timed(lambda fields=fields: work.patch(f"{BEADS}/b30000", fields))
        problem = assert_problem(answer, 409, "too-many-beads", most=bounds.graph)
        assert str(bounds.graph) in problem["detail"]
        assert took < 2 * FAST
    assert work.patch(f"{BEADS}/b59999", {"blocked_by": ["b3"]}).status == 200, "nobody waits for it"


@pytest.mark.parametrize("adds", ["UPDATE beads SET blocked_by = '{y}' WHERE id = 'x'", "SELECT lock_bead_graph()"])
def test_adding_a_dependency_stops_nobody_who_adds_none(work: AppClient, sql: Sql, session: Session, adds: str) -> None:
    """While a transaction that adds one stays open, others complete, close, delete, unlink and plan."""
    for key in ("x", "y", "claimed", "closed", "deleted", "blocker"):
        bead(work, key)
    bead(work, "linked", blocked_by=["blocker", "deleted"], parent="closed")
    token = claim(work, "claimed")
    with session() as conn, ThreadPoolExecutor(1) as thread:
        conn.cursor().execute(adds)
        for call in (
            lambda: complete(work, "claimed", token),
            lambda: work.patch(f"{BEADS}/closed", {"status": "closed"}),
            lambda: work.patch(f"{BEADS}/closed", {"status": "open"}),
            lambda: work.delete(f"{BEADS}/deleted"),
            lambda: work.patch(f"{BEADS}/linked", {"blocked_by": [], "parent": None}),
            lambda: work.post(BEADS, {"title": "t", "project_id": PROJECT, "blocked_by": ["blocker", "claimed"]}),
            lambda: work.post(BEADS, {"title": "t", "project_id": PROJECT, "parent": "blocker", "blocks": ["linked"]}),
            lambda: work.post(BULK, {"beads": [{"title": "t", "project_id": PROJECT, "blocked_by": ["blocker"]}] * 3}),
            lambda: work.put(f"{BEADS}/linked", get(work, "linked")),
        ):
            answer, took = timed(call)
            assert answer.status < 300, answer
            assert took < 1, (answer, took)
        late = thread.submit(work.patch, f"{BEADS}/blocker", {"blocked_by": ["claimed"]})
        waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        wait_until(lambda: sql(waiting))
        assert not late.done(), "one transaction at a time adds dependencies"
        conn.commit()
        assert late.result().status == 200
    assert_counted(sql)


def test_a_bead_that_is_closed_while_another_comes_to_wait_for_it_keeps_nobody_waiting(
    work: AppClient, sql: Sql, session: Session
) -> None:
    """Whichever of the two comes first: the closing counts the other, or the other finds it closed."""
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = sql(deadlocks)
    for n in range(60):
        a, b = (f"a{n}", f"b{n}") if n % 2 else (f"b{n}", f"a{n}")  # in the order of ids, and against it
        bead(work, a)
        bead(work, b)
        token = claim(work, a)
        with ThreadPoolExecutor(2) as threads:
            ended = threads.submit(complete, work, a, token)
            linked = threads.submit(work.patch, f"{BEADS}/{b}", {"blocked_by": [a]})
            assert (ended.result().status, linked.result().status) == (200, 200)
        assert sql("SELECT open_blockers FROM beads WHERE id = %s", b) == [(0,)]
    assert_counted(sql)
    assert sql(deadlocks) == before


# How many may wait for one


def waiters(work: AppClient, key: str, n: int) -> dict[str, Callable[[], Answer]]:
    """Each makes one more bead wait for b, or for its child."""
    new = {"title": "t", "project_id": PROJECT}
    return {
        "patch": lambda: work.patch(f"{BEADS}/w{n}", {"blocked_by": [key]}),
        "create": lambda: work.post(BEADS, {**new, "blocked_by": [key]}),
        "bulk": lambda: work.post(BULK, {"beads": [{**new, "ref": "r"}, {**new, "blocked_by": [key, "r"]}]}),
        "blocks": lambda: work.patch(f"{BEADS}/{key}", {"blocks": [*get(work, key).get("blocks", ()), f"w{n}"]}),
    }


def test_of_many_that_race_to_wait_for_a_bead_only_so_many_do(work: AppClient, sql: Sql) -> None:
    bead(work, "b")
    seed_beads(sql, bounds.dependants - 3, "'{b}'", "'d' || n")
    for n in range(12):
        bead(work, f"w{n}")
    calls = [call for n in range(12) for how, call in waiters(work, "b", n).items() if how != "blocks"]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda call: call(), calls))
    assert Counter(answer.status < 300 for answer in answers) == {True: 3, False: len(calls) - 3}
    for answer in answers:
        if answer.status >= 300:
            problem = assert_problem(answer, 409, "too-many-beads", bead_id="b", most=bounds.dependants)
            assert str(bounds.dependants) in problem["detail"]
    assert sql("SELECT count(*) FROM bead_blockers WHERE blocker_id = 'b'") == [(bounds.dependants,)]


def test_a_bead_has_no_more_children_than_may_wait_for_it(work: AppClient, sql: Sql) -> None:
    bead(work, "b")
    status = "CASE n % 2 WHEN 0 THEN 'open' ELSE 'closed' END"
    seed_beads(sql, bounds.dependants - 1, key="'c' || n", parent="'b'", status=status)
    bead(work, "w")
    calls = [
        lambda: work.patch(f"{BEADS}/w", {"parent": "b"}),
        *[lambda: work.post(BEADS, {"title": "t", "project_id": PROJECT, "parent": "b"})] * 4,
        *[lambda: work.post(BULK, {"beads": [{"title": "t", "project_id": PROJECT, "parent": "b"}]})] * 3,
    ]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda call: call(), calls))
    assert Counter(answer.status < 300 for answer in answers) == {True: 1, False: 7}
    assert_problem(next(answer for answer in answers if answer.status == 409), 409, "too-many-beads", bead_id="b")


@pytest.mark.parametrize("how", ["complete", "close"])
def test_what_ten_thousand_wait_for_is_closed_in_one_request(work: AppClient, sql: Sql, how: str) -> None:
    bead(work, "b")
    token = claim(work, "b")
    seed_beads(sql, bounds.dependants, "'{b}'", "'d' || n")
    ways = {
        "complete": lambda: complete(work, "b", token),
        "close": lambda: work.patch(f"{BEADS}/b", {"status": "closed"}),
    }
    answer, took = timed(ways[how])
    assert answer.status == 200, answer
    assert took < 4
    assert sql("SELECT count(*) FROM beads WHERE open_blockers <> 0") == [(0,)]
    assert work.post(f"{BEADS}/claim", {"agent_id": "a"}).status == 200


def test_a_list_that_would_change_very_many_beads_is_refused_with_what_to_do(work: AppClient, sql: Sql) -> None:
    seed_beads(sql, 1000)
    bead(work, "x")
    every = [f"b{n}" for n in range(1000)]
    calls = [
        lambda: work.patch(f"{BEADS}/x", {"blocks": every}),
        lambda: work.patch(f"{BEADS}/x", {"children": every}),
        lambda: work.post(BEADS, {"title": "t", "project_id": PROJECT, "blocks": every}),
        lambda: work.post(BULK, {"beads": [{"title": "t", "project_id": PROJECT, "blocks": every}]}),
        lambda: work.post(BULK, {"beads": [{"title": "t", "project_id": PROJECT, "children": every}]}),
    ]
    for call in calls:
        answer, took = timed(call)
        problem = assert_problem(answer, 409, "too-many-beads", beads=1000, most=bounds.names)
        assert "blocked_by" in problem["detail"]
        assert took < 1
    assert work.patch(f"{BEADS}/x", {"blocked_by": every}).status == 200, "its own list locks no other names"
    patch(work, "x", blocked_by=[])
    for n in range(0, 1001, bounds.names):
        patch(work, "x", blocks=every[:n])
    assert len(get(work, "x")["blocks"]) == 1000
    assert_counters(sql)


def test_the_bounds_are_the_same_in_the_database(sql: Sql) -> None:
    for name in ("dependants", "graph", "names"):
        assert sql("SELECT bound(%s)", name) == [(getattr(bounds, name),)]
