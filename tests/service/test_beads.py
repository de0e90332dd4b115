"""Dependencies, bulk creation and comments: nothing waits for itself or for ever, and no count is wrong."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.client import Answer
from harness.entities import PROJECTS
from harness.locks import Sql, acquire, assert_problem
from harness.work import AGENTS, BEADS, PROJECT, assert_counted, bead, claim, get, lapse, make, patch, team

from loom import db
from loom.upkeep import Upkeep

BULK = BEADS + "/bulk"


@pytest.fixture
def work(client: AppClient, sql: Sql) -> AppClient:
    """A client, with a project and the agent a."""
    team(client, "a")
    return client


def dependencies(client: AppClient, key: str) -> dict[str, Any]:
    names = ("blocked_by", "blocks", "parent", "children")
    return {name: value for name, value in get(client, key).items() if name in names}


def counters(sql: Sql) -> dict[str, tuple[int, int]]:
    """What keeps each from being ready: blockers, children."""
    return {key: counts for key, *counts in sql("SELECT id, open_blockers, open_children FROM beads")}


def assert_cycle(answer: Answer, *keys: str) -> None:
    """Refused, and it is shown who would wait for whom, from any of them on."""
    cycle = assert_problem(answer, 409, "cycle")["cycle"]
    assert cycle[0] == cycle[-1]
    turned = [cycle[n:-1] + cycle[:n] for n in range(len(cycle) - 1)]
    assert list(keys) in turned, cycle
    assert " -> ".join(cycle) in answer.json["detail"]


# Dependencies


def test_what_blocks_and_what_belongs_is_written_from_either_end(work: AppClient, sql: Sql) -> None:
    for key in "abcd":
        bead(work, key)
    patch(work, "a", blocks=["b", "c"], children=["d"])
    assert dependencies(work, "a") == {"blocks": ["b", "c"], "children": ["d"]}
    assert [dependencies(work, key) for key in "bcd"] == [{"blocked_by": ["a"]}, {"blocked_by": ["a"]}, {"parent": "a"}]
    patch(work, "a", blocks=["c", "d"], children=["b"])
    assert [dependencies(work, key) for key in "bcd"] == [{"parent": "a"}, {"blocked_by": ["a"]}, {"blocked_by": ["a"]}]
    patch(work, "c", blocked_by=[])
    patch(work, "b", parent=None)
    assert dependencies(work, "a") == {"blocks": ["d"]}
    assert counters(sql) == {"a": [0, 0], "b": [0, 0], "c": [0, 0], "d": [1, 0]}
    new = bead(work, "e", blocked_by=["a", "b", "a"], blocks=["c"], parent="d", children=["b"])
    assert new["blocked_by"] == ["a", "b"]
    assert new["version"] == 1
    assert counters(sql) == {"a": [0, 0], "b": [0, 0], "c": [1, 0], "d": [1, 1], "e": [2, 1]}
    assert_counted(sql)


def test_a_derived_field_changes_the_others_and_says_so(work: AppClient, sql: Sql) -> None:
    for key in "abc":
        bead(work, key)
    answer = work.patch(f"{BEADS}/a", {"blocks": ["b"], "children": ["c"]}, headers={"Loom-Actor": "ann"})
    assert answer.json["version"] == 1, "its own fields are as they were"
    assert [get(work, key)["version"] for key in "bc"] == [2, 2]
    written = "SELECT entity_id, actor, changes FROM events WHERE version = 2 ORDER BY entity_id"
    assert sql(written) == [("b", "ann", {"blocked_by": ["a"]}), ("c", "ann", {"parent": "a"})]
    work.patch(f"{BEADS}/a", {"blocks": ["b"], "children": ["c"]})
    assert [get(work, key)["version"] for key in "bc"] == [2, 2], "nothing has changed"


@pytest.mark.parametrize("field", ["blocked_by", "blocks", "children", "parent", "assigned_to", "project_id"])
def test_a_reference_to_nothing_is_named_and_nothing_is_written(work: AppClient, sql: Sql, field: str) -> None:
    bead(work, "x", blocked_by=[bead(work, "y")["id"]])
    before = sql("SELECT count(*), max(version) FROM beads")
    value = ["y", "nobody"] if field in ("blocked_by", "blocks", "children") else "nobody"
    for answer in (
        work.patch(f"{BEADS}/x", {"title": "new", field: value}),
        work.put(f"{BEADS}/x", {"title": "new", field: value}),
        work.post(BEADS, {"id": "z", "title": "new", "project_id": PROJECT, field: value}),
        work.post(BULK, {"beads": [{"id": "z", "title": "new", "project_id": PROJECT, field: value}]}),
    ):
        (error,) = assert_problem(answer, 400, "invalid")["errors"]
        assert error["field"].removeprefix("beads[0].") == field
        assert "nobody" in error["problem"]
    assert sql("SELECT count(*), max(version) FROM beads") == before


def test_a_bead_cannot_wait_for_itself(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    for field, value in (("blocked_by", ["x"]), ("blocks", ["x"]), ("parent", "x"), ("children", ["x"])):
        assert_cycle(work.patch(f"{BEADS}/x", {field: value}), "x")
        new = {"id": "y", "title": "t", "project_id": PROJECT, field: ["y"] if isinstance(value, list) else "y"}
        assert_cycle(work.post(BEADS, new), "y")
        assert_cycle(work.post(BULK, {"beads": [{**new, "ref": "y"}]}), "y")
    assert sql("SELECT id, version FROM beads") == [("x", 1)]
    assert_counted(sql)


def test_a_cycle_is_refused_and_shown(work: AppClient, sql: Sql) -> None:
    for key in "abcd":
        bead(work, key)
    patch(work, "a", blocked_by=["b"])
    patch(work, "b", blocked_by=["c", "d"])
    assert_cycle(work.patch(f"{BEADS}/c", {"blocked_by": ["d", "a"]}), "c", "a", "b")
    assert_cycle(work.patch(f"{BEADS}/a", {"blocks": ["c"]}), "c", "a", "b")
    assert_cycle(work.patch(f"{BEADS}/d", {"children": ["a"]}), "d", "a", "b")  # a parent waits for its children
    assert_cycle(work.patch(f"{BEADS}/a", {"parent": "d"}), "d", "a", "b")
    patch(work, "c", parent="a")  # a waits for c through b already
    assert_cycle(work.patch(f"{BEADS}/c", {"blocked_by": ["a"]}), "c", "a")
    assert_cycle(work.patch(f"{BEADS}/a", {"parent": "c"}), "c", "a")
    answer = work.post(BEADS, {"id": "e", "title": "e", "project_id": PROJECT, "parent": "b", "blocked_by": ["a"]})
    assert_cycle(answer, "e", "a", "b")
    patch(work, "b", blocked_by=["d"])
    patch(work, "c", blocked_by=["d"])
    assert_counted(sql)


def test_a_cycle_made_by_hand_is_refused(work: AppClient, sql: Sql) -> None:
    for key in "abc":
        bead(work, key)
    sql("UPDATE beads SET blocked_by = '{b}' WHERE id = 'a'")
    for statement in (
        "UPDATE beads SET blocked_by = '{a}' WHERE id = 'b'",
        "UPDATE beads SET parent = 'b' WHERE id = 'a'",
        "UPDATE beads SET blocked_by = CASE id WHEN 'b' THEN '{c}' ELSE '{b}' END::text[] WHERE id IN ('b', 'c')",
        "UPDATE beads SET parent = CASE id WHEN 'b' THEN 'c' ELSE 'b' END WHERE id IN ('b', 'c')",
        "UPDATE beads SET blocked_by = CASE id WHEN 'a' THEN '{b,c}' WHEN 'b' THEN '{a,c}' ELSE '{a,b}' END::text[]",
        "INSERT INTO beads (id, title, project_id, parent) VALUES ('d', 'd', 'p', 'd')",
    ):
        with pytest.raises(Exception, match="wait for each other"):
            sql(statement)
    assert_counted(sql)


@pytest.mark.parametrize("second", [{"blocked_by": ["a"]}, {"parent": "a"}], ids=str)
def test_two_that_race_to_make_a_cycle_make_none(work: AppClient, sql: Sql, second: dict[str, Any]) -> None:
    """a is to wait for b, and at the same time b for a, or a (as its parent) for b and b for a."""
    first = {"blocked_by": ["b"]} if "blocked_by" in second else {"parent": "b"}
    begin = threading.Barrier(2)

    def write(key: str, fields: dict[str, Any]) -> list[Answer]:
        answers = []
        for _ in range(100):
            begin.wait()
            answers.append(work.patch(f"{BEADS}/{key}", fields))
            begin.wait()
            patch(work, key, **{name: [] if isinstance(value, list) else None for name, value in fields.items()})
        return answers

    bead(work, "a")
    bead(work, "b")
    with ThreadPoolExecutor(2) as threads:
        pairs = list(zip(*threads.map(write, "ab", (first, second)), strict=True))
    for pair in pairs:
        won, lost = sorted(pair, key=lambda answer: answer.status)
        assert won.status == 200, won
        assert_cycle(lost, *("ab" if lost.json["cycle"][0] == "a" else "ba"))
    assert_counted(sql)


def test_long_rings_raced_for_never_close(work: AppClient, sql: Sql) -> None:
    """Eight threads each add one side of a ring of eight: the last one to come is refused, whoever that is."""
    size, begin = 8, threading.Barrier(8)
    for n in range(size):
        bead(work, f"r{n}")

    def write(n: int) -> list[Answer]:
        answers = []
        for turn in range(20):
            begin.wait()
            field, value = (
                ("blocked_by", [f"r{(n + 1) % size}"]) if (n + turn) % 2 else ("blocks", [f"r{n - 1 % size}"])
            )
            if field == "blocks":  # the same side, written from its other end
                answers.append(work.patch(f"{BEADS}/r{(n + 1) % size}", {"blocks": [f"r{n}"]}))
            else:
                answers.append(work.patch(f"{BEADS}/r{n}", {field: value}))
            begin.wait()
            if n == 0:
                sql("UPDATE beads SET blocked_by = '{}'")
            begin.wait()
        return answers

    with ThreadPoolExecutor(size) as threads:
        rounds = list(zip(*threads.map(write, range(size)), strict=True))
    for answers in rounds:
        assert Counter(answer.status for answer in answers) == {200: size - 1, 409: 1}
        (refused,) = [answer for answer in answers if answer.status == 409]
        assert len(assert_problem(refused, 409, "cycle")["cycle"]) == size + 1
    assert_counted(sql)


def test_closing_frees_what_it_blocked_at_once_and_reopening_holds_it_up_again(work: AppClient, sql: Sql) -> None:
    for key in "abc":
        bead(work, key)
    bead(work, "x", blocked_by=["a", "b"], children=["c"])
    for key in "abc":
        assert work.post(f"{BEADS}/x/claim", {"agent_id": "a"}).status == 409
        patch(work, key, status="closed")
    token = claim(work, "x")
    assert work.delete(f"{BEADS}/x/claim?fencing_token={token}").status == 204
    patch(work, "a", status="open")
    assert assert_problem(work.post(f"{BEADS}/x/claim", {"agent_id": "a"}), 409, "bead-blocked")["blocked_by"] == ["a"]
    assert get(work, "x")["status"] == "open", "being blocked by others never changes the status"
    assert_counted(sql)


# Deferred and delayed


def test_a_deferred_bead_is_given_to_nobody_until_somebody_opens_it(work: AppClient, sql: Sql) -> None:
    bead(work, "x", status="deferred", priority=4)
    assert work.post(f"{BEADS}/claim", {"agent_id": "a"}).status == 204
    assert "deferred" in assert_problem(work.post(f"{BEADS}/x/claim", {"agent_id": "a"}), 409, "bead-blocked")["detail"]
    assert [found["id"] for found in work.get(f"{BEADS}?status=deferred").json] == ["x"]
    patch(work, "x", status="open")
    patch(work, "x", status="deferred", not_before="2999-01-01T00:00:00Z")
    assert get(work, "x")["not_before"] == "2999-01-01T00:00:00Z"
    problem = assert_problem(work.post(f"{BEADS}/x/claim", {"agent_id": "a"}), 409, "bead-blocked")
    assert problem["not_before"] == "2999-01-01T00:00:00Z"
    patch(work, "x", status="open")
    assert "not_before" not in get(work, "x")
    assert claim(work, "x")
    assert_counted(sql)


@pytest.mark.parametrize("how", ["next", "by id", "upkeep"])
def test_a_deferred_bead_is_open_once_its_time_has_come(work: AppClient, sql: Sql, cleaner: Upkeep, how: str) -> None:
    bead(work, "x", status="deferred", not_before="2999-01-01T00:00:00Z")
    sql("UPDATE beads SET not_before = clock_timestamp() + INTERVAL '10 ms' WHERE id = 'x'")
    wait_until(lambda: sql("SELECT not_before < clock_timestamp() FROM beads") == [(True,)])
    if how == "upkeep":
        cleaner.clean()
        assert (get(work, "x")["status"], get(work, "x")["version"]) == ("open", 2)
    elif how == "next":
        assert work.post(f"{BEADS}/claim", {"agent_id": "a"}).json["bead"]["id"] == "x"
    else:
        claim(work, "x")
    assert sql("SELECT changes ->> 'status' FROM events WHERE entity_id = 'x' ORDER BY place")[:2] == [
        ("deferred",),
        ("open",),
    ]
    assert_counted(sql)


def test_an_open_bead_can_be_delayed_and_its_lease_ends_all_the_same(work: AppClient, sql: Sql) -> None:
    later = "2999-01-01T00:00:00Z"
    bead(work, "x", not_before=later)
    assert work.post(f"{BEADS}/claim", {"agent_id": "a"}).status == 204
    assert patch(work, "x", not_before=None)["version"] == 2
    claim(work, "x")
    assert "not_before" not in patch(work, "x", not_before=later), "a claimed bead has a lease, and no delay"
    lapse(sql, "x")
    claim(work, "x")
    bead(work, "y")
    assert patch(work, "y", not_before=later)["not_before"] == later
    assert sql("SELECT changes FROM events WHERE entity_id = 'y' AND version = 2")[0][0]["not_before"]
    for status in ("closed", "blocked", "in_progress"):
        assert "not_before" not in patch(work, "y", status=status, not_before=later)
    assert_counted(sql)


def test_a_deferred_bead_keeps_its_project_its_parent_and_what_waits_for_it_open(work: AppClient, sql: Sql) -> None:
    bead(work, "parent", blocked_by=[bead(work, "x", status="deferred")["id"]])
    patch(work, "x", parent="parent", blocks=[])
    assert work.post(f"{BEADS}/parent/claim", {"agent_id": "a"}).status == 409
    patch(work, "parent", status="closed")
    issues = assert_problem(work.post(f"{PROJECTS}/p/close", {"author_id": "a"}), 409, "conflict")["readiness_issues"]
    assert issues == ["1 beads are not closed"]
    assert_counted(sql)


# Who a bead is assigned to


def test_a_bead_is_assigned_to_an_agent_by_its_id_or_by_a_role_that_no_other_has(work: AppClient, sql: Sql) -> None:
    for agent, role in (("b", "tester"), ("c", "coder"), ("d", "coder"), ("e", "a")):
        make(work, AGENTS, id=agent, persona_name="w", project_id=PROJECT, role=role)
    assert bead(work, "x", assigned_to="tester")["assigned_to"] == "b"
    assert patch(work, "x", assigned_to="a")["assigned_to"] == "a", "an id comes before a role"
    assert patch(work, "x", assigned_to="tester", status="open")["assigned_to"] == "b"
    (made,) = bulk(work, {"assigned_to": "tester"}).json
    assert made["assigned_to"] == "b"
    sql("UPDATE beads SET assigned_to = 'tester'")
    assert sql("SELECT DISTINCT assigned_to FROM beads") == [("b",)]
    claim(work, "x", "b")
    assert patch(work, "x", assigned_to="tester")["fencing_token"], "it has it already"
    for name in ("coder", "nobody"):
        for answer in (
            work.patch(f"{BEADS}/x", {"assigned_to": name}),
            work.put(f"{BEADS}/x", {"assigned_to": name, "status": "open"}),
            work.post(BEADS, {"title": "t", "project_id": PROJECT, "assigned_to": name}),
            bulk(work, {"assigned_to": name}),
        ):
            (error,) = assert_problem(answer, 400, "invalid")["errors"]
            assert error["problem"] == f"{name} is neither an agent's id nor the role of exactly one agent"
    assert acquire(work, "agent:b")
    assert_problem(work.post(BEADS, {"title": "t", "project_id": PROJECT, "assigned_to": "tester"}), 409, "lock-held")
    assert_counted(sql)


# What is deleted, and what referred to it


def test_a_deleted_bead_is_waited_for_by_nobody(work: AppClient, sql: Sql) -> None:
    for key in "abc":
        bead(work, key)
    bead(work, "x", blocked_by=["a", "b"], parent="c", blocks=["c"])
    patch(work, "a", children=["b"])
    for key in ("a", "x"):
        assert work.delete(f"{BEADS}/{key}", headers={"Loom-Actor": "ann"}).status == 204
    assert [dependencies(work, key) for key in "bc"] == [{}, {}]
    assert sql("SELECT DISTINCT actor FROM events WHERE type = 'bead.deleted'") == [("ann",)]
    assert_counted(sql)
    assert bead(work, "a")["version"] == 1
    assert dependencies(work, "a") == {}


def test_a_deleted_agents_beads_are_free_and_those_that_it_closed_can_be_reopened(work: AppClient, sql: Sql) -> None:
    make(work, AGENTS, id="b", persona_name="w", project_id=PROJECT)
    for key in ("claimed", "reserved", "closed"):
        bead(work, key, assigned_to=None if key == "claimed" else "b")
    claim(work, "claimed", "b")
    patch(work, "closed", status="closed")
    assert work.delete(f"{AGENTS}/b").status == 204
    for key in ("claimed", "reserved"):
        assert get(work, key)["status"] == "open"
        assert "assigned_to" not in get(work, key)
        claim(work, key)
    assert get(work, "closed")["assigned_to"] == "b", "who did it stays known"
    patch(work, "closed", title="still closed")
    assert get(work, "closed")["assigned_to"] == "b"
    patch(work, "closed", status="open")
    claim(work, "closed")
    assert_counted(sql)


def test_an_agent_marked_dead_gives_its_beads_back(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    claim(work, "x")
    assert work.patch(f"{AGENTS}/a", {"status": "dead"}).status == 200
    assert (get(work, "x")["status"], get(work, "x")["attempts"]) == ("open", 1)
    assert "current_bead" not in work.get(f"{AGENTS}/a").json
    assert_counted(sql)


def test_a_deleted_provider_leaves_its_agents(work: AppClient, sql: Sql) -> None:
    make(work, "/api/v1/providers", id="v", name="v")
    work.patch(f"{AGENTS}/a", {"provider_id": "v"})
    assert work.delete("/api/v1/providers/v").status == 204
    agent = work.get(f"{AGENTS}/a").json
    assert ("provider_id" in agent, agent["version"]) == (False, 3)
    assert_counted(sql)


def test_tables_emptied_by_hand_leave_nothing_behind(work: AppClient, sql: Sql) -> None:
    bead(work, "x", blocked_by=[bead(work, "y")["id"]])
    claim(work, "y")
    sql("TRUNCATE beads")
    assert_counted(sql)
    bead(work, "y")
    assert dependencies(work, bead(work, "x")["id"]) == {}
    patch(work, "y", status="closed")
    claim(work, "x")
    assert_counted(sql)


class Storm:
    """Random changes of dependencies and statuses by one thread, by a seed."""

    def __init__(self, client: AppClient, seed: int, number: int, keys: list[str]) -> None:
        self.client, self.random, self.keys = client, random.Random(f"{seed} {number}"), keys
        self.answers: Counter[int] = Counter()

    def run(self, steps: int) -> Counter[int]:
        for _ in range(steps):
            key, some = self.random.choice(self.keys), self.random.sample(self.keys, self.random.randrange(3))
            body = self.random.choice(
                [
                    {"status": self.random.choice(["open", "closed", "closed", "in_progress", "blocked"])},
                    {"blocked_by": some},
                    {"blocks": some},
                    {"children": some},
                    {"parent": some[0] if some else None},
                    {"status": "closed", "blocks": some},
                ]
            )
            method = self.random.choice(["PATCH", "PUT"])
            if self.random.random() < 0.05:
                self.note(self.client.delete(f"{BEADS}/{key}"))
                beads = [{"id": key, "title": "t", "project_id": PROJECT, "blocked_by": some[:1]}, {"id": "new"}]
                self.note(
                    self.client.post(BULK if self.random.random() < 0.5 else BEADS, beads[0] | {"beads": beads[:1]})
                )
            else:
                self.note(self.client.request(method, f"{BEADS}/{key}", body))
        return self.answers

    def note(self, answer: Answer) -> None:
        # `busy`: it would have had to wait for too long for a bead that all of them want.
        assert answer.status < 500 or answer.json["type"] == "/problems/busy", answer
        self.answers[answer.status] += 1


def test_a_storm_of_changes_leaves_every_count_right_and_meets_no_deadlock(
    work: AppClient, sql: Sql, seed: int, long: bool
) -> None:
    keys = [f"x{n}" for n in range(12)]
    for key in keys:
        bead(work, key)
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = sql(deadlocks)
    with ThreadPoolExecutor(8) as threads:
        storms = [Storm(work, seed, n, keys) for n in range(8)]
        answers = sum(threads.map(lambda storm: storm.run(2000 if long else 100), storms), Counter())
    assert answers[200] > 100, answers
    assert answers[409] > 10, answers
    assert_counted(sql)
    assert sql(deadlocks) == before
    waits = "WITH RECURSIVE w AS (SELECT id, unnest(blocked_by) AS on FROM beads) SELECT 1 FROM w WHERE id = w.on"
    assert sql(waits) == []


@pytest.mark.parametrize("how", ["depends", "blocks", "closes", "completes", "deleted"])
def test_a_change_of_dependencies_and_a_heartbeat_at_once_meet_no_deadlock(
    work: AppClient, sql: Sql, session: Callable[[], Any], how: str
) -> None:
    """What changes c comes to a and b as well; the heartbeat to b and then to c. An operator has a for a while."""
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = sql(deadlocks)
    for key in "abc":
        bead(work, key)
    tokens = {key: claim(work, key) for key in "bc"}
    if how not in ("depends", "blocks"):
        patch(work, "c", blocks=["a", "b"])
    calls: dict[str, Callable[[], Answer]] = {
        "depends": lambda: work.patch(f"{BEADS}/c", {"blocked_by": ["a", "b"]}),
        "blocks": lambda: work.patch(f"{BEADS}/c", {"blocks": ["a", "b"]}),
        "closes": lambda: work.patch(f"{BEADS}/c", {"status": "closed"}),
        "completes": lambda: work.post(f"{BEADS}/c/complete", {"fencing_token": tokens["c"]}),
        "deleted": lambda: work.delete(f"{BEADS}/c"),
    }
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with session() as operator, operator.cursor() as cursor, ThreadPoolExecutor(2) as threads:
        cursor.execute("SELECT 1 FROM beads WHERE id = 'a' FOR UPDATE")
        change = threads.submit(calls[how])
        wait_until(lambda: sql(waiting) == [(1,)])
        beat = threads.submit(work.post, f"{AGENTS}/a/heartbeat", {"claims": tokens})
        wait_until(lambda: beat.done() or sql(waiting) == [(2,)])
        operator.commit()
        assert change.result().status < 300
        assert beat.result().status == 200
    assert sql(deadlocks) == before
    assert_counted(sql)


# Bulk


def test_a_whole_plan_is_made_in_one_call_in_its_order(
    work: AppClient, sql: Sql, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    beads = [{"title": f"t{n}", "project_id": PROJECT, "ref": f"r{n}"} for n in range(1000)]
    for n, one in enumerate(beads):
        if n % 10:
            one["parent"] = f"r{n - n % 10}"
        if n % 10 > 1:
            one["blocked_by"] = [f"r{n - 1}"]
    random.Random(seed).shuffle(beads)
    statements = []
    execute = db.Connection.execute
    monkeypatch.setattr(
        db.Connection, "execute", lambda *args, **kw: statements.append(args[1]) or execute(*args, **kw)
    )
    answer = work.post(BULK, {"beads": beads})
    assert answer.status == 201, answer  # within 5 s: later would be 503
    made = answer.json
    assert [one["title"] for one in made] == [one["title"] for one in beads]
    ids = {one["ref"]: bead["id"] for one, bead in zip(beads, made, strict=True)}
    for one, found in zip(beads, made, strict=True):
        assert found.get("parent") == ids.get(one.get("parent"))
        assert found.get("blocked_by", []) == [ids[other] for other in one.get("blocked_by", ())]
        assert found["version"] == 1
    assert len(statements) <= 4
    assert_counted(sql)
    order = sql("SELECT id FROM beads ORDER BY created_at")
    assert [key for (key,) in order] == [bead["id"] for bead in made], "their order is their age"


def bulk(client: AppClient, *beads: dict[str, Any], **more: Any) -> Answer:
    return client.post(BULK, {"beads": [{"title": "t", "project_id": PROJECT, **one} for one in beads]}, **more)


def test_beads_of_one_call_refer_to_each_other_and_to_others_in_every_way(work: AppClient, sql: Sql) -> None:
    for key in ("old", "older"):
        bead(work, key)
    answer = bulk(
        work,
        {"id": "a", "blocks": ["c", "old"], "children": ["c", "older"], "blocked_by": ["c"]},
        {"ref": "c", "related_to": ["a", "d"]},
        {"ref": "d", "id": "dd", "blocked_by": ["old", "old"], "parent": "old", "tags": ["x"], "status": "closed"},
    )
    assert_cycle(answer, "a", "c")
    answer = bulk(
        work,
        {"id": "a", "blocks": ["old"], "children": ["c", "older"], "blocked_by": ["c"]},
        {"ref": "c", "id": "cc", "related_to": ["a", "d"], "blocks": []},
        {"ref": "d", "id": "dd", "blocked_by": ["c", "c"], "parent": "old", "tags": ["x"], "status": "closed"},
        {"id": "e", "blocks": ["old", "a"], "due_date": "2030-02-01T01:00:00+02:00"},
    )
    assert answer.status == 201, answer
    assert [bead["id"] for bead in answer.json] == ["a", "cc", "dd", "e"]
    assert answer.json[3]["due_date"] == "2030-01-31T23:00:00Z"
    assert answer.json == [get(work, bead["id"]) for bead in answer.json]
    assert dependencies(work, "a") == {"blocks": ["old"], "children": ["cc", "older"], "blocked_by": ["cc", "e"]}
    assert dependencies(work, "cc") == {"blocks": ["a", "dd"], "parent": "a"}
    assert dependencies(work, "old") == {"blocked_by": ["a", "e"], "children": ["dd"]}
    assert (get(work, "old")["version"], get(work, "older")["version"]) == (2, 2), "one change each"
    assert get(work, "cc")["related_to"] == ["a", "dd"]
    assert get(work, "dd")["closed_at"]
    assert_counted(sql)


def test_none_is_made_when_one_cannot_be(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    good = {"ref": "good"}
    for answer, field in (
        (bulk(work, good, {"blocked_by": ["nobody"]}), "beads[1].blocked_by"),
        (bulk(work, good, {"blocks": ["good", "nobody"]}), "beads[1].blocks"),
        (bulk(work, good, {"children": ["nobody"]}), "beads[1].children"),
        (bulk(work, good, {"parent": "nobody"}), "beads[1].parent"),
        (bulk(work, good, {"assigned_to": "nobody"}), "beads[1].assigned_to"),
        (bulk(work, good, {"project_id": "nobody"}), "beads[1].project_id"),
        (bulk(work, good, {"priority": 5}), "beads[1].priority"),
        (bulk(work, good, {"due_date": "9999-12-31T23:59:59-01:00"}), "due_date"),
        (bulk(work, good, {"unknown": 1}), "beads[1].unknown"),
        (bulk(work, good, {"title": ""}), "beads[1].title"),
        (bulk(work, good, {"id": "a/b"}), "beads[1].id"),
        (bulk(work, good, {"ref": "good"}), "beads"),
        (bulk(work, good, {"id": "good"}), "beads"),
        (bulk(work, {"id": "same"}, {"id": "same"}), "beads"),
        (bulk(work), "beads"),
        (bulk(work, *[{}] * 1001), "beads"),
        (work.post(BULK, {"beads": [{"title": "t"}]}), "beads[0].project_id"),
        (work.post(BULK, {"beads": [{"title": "t", "project_id": PROJECT}], "atomic": True}), "atomic"),
        (work.post(BULK), "beads"),
    ):
        problem = assert_problem(answer, 400, "invalid")
        assert [error["field"] for error in problem["errors"]] == [field], answer
    problem = assert_problem(bulk(work, good, {"status": "done"}), 400, "invalid")
    assert problem["errors"][0]["allowed"] == ["blocked", "closed", "deferred", "in_progress", "open"]
    assert assert_problem(bulk(work, good, {"id": "x"}), 409, "taken")["id"] == "x"
    assert_cycle(bulk(work, {"ref": "1", "blocked_by": ["2"]}, {"ref": "2", "blocked_by": ["1"]}), "1", "2")
    assert_cycle(bulk(work, {"ref": "1", "parent": "2"}, {"ref": "2", "parent": "1"}), "1", "2")
    assert_cycle(bulk(work, {"ref": "1", "parent": "2", "blocked_by": ["2"]}, {"ref": "2"}), "1", "2")
    assert_cycle(bulk(work, {"ref": "1", "blocked_by": ["x"], "blocks": ["x"]}), "1", "x")
    assert_cycle(bulk(work, {"ref": "1", "blocked_by": ["x"], "parent": "x"}), "1", "x")
    lock = acquire(work, "bead:x")
    assert_problem(bulk(work, good, {"blocks": ["x"]}), 409, "lock-held")
    assert_problem(bulk(work, good, headers={"Loom-Lock-Token": '1; lock="bead:x"'}), 409, "lock-lost")
    assert sql("SELECT id, version FROM beads") == [("x", 1)]
    token = {"Loom-Lock-Token": f'{lock["fencing_token"]}; lock="bead:x"'}
    assert bulk(work, good, {"blocks": ["x"]}, headers=token).status == 201


def test_an_id_that_is_taken_meanwhile(
    work: AppClient, sql: Sql, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    new = {"id": "x(1)=y", "title": "t", "project_id": PROJECT}
    for path, body in ((BEADS, new), (BULK, {"beads": [new]})):
        with session() as other, other.cursor() as cursor, ThreadPoolExecutor(1) as thread:
            cursor.execute("INSERT INTO beads (id, title, project_id) VALUES ('x(1)=y', 'first', %s)", (PROJECT,))
            late = thread.submit(work.post, path, body)
            wait_until(lambda: sql("SELECT 1 FROM pg_locks WHERE NOT granted"))
            other.commit()
            assert_problem(late.result(), 409, "taken", id="x(1)=y")
        assert get(work, "x(1)=y")["title"] == "first"
        sql("DELETE FROM beads")


def test_an_id_that_we_make_is_nobody_elses_in_the_same_call(work: AppClient) -> None:
    answer = bulk(work, {}, {"id": "bd-002"}, {"id": "bd-001"}, {})
    assert answer.status == 201, answer
    ids = [bead["id"] for bead in answer.json]
    assert len(set(ids)) == 4
    assert ids[1:3] == ["bd-002", "bd-001"]
    assert bead(work, "bd-007")
    assert [bulk(work, {}).status for _ in range(10)] == [201] * 10


def test_plans_made_at_once_have_ids_of_their_own(work: AppClient, sql: Sql) -> None:
    bead(work, "old")
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = sql(deadlocks)
    beads = [{"ref": "a"}, {"ref": "b", "blocked_by": ["a"], "blocks": ["old"]}, {"parent": "a"}]

    def make(n: int) -> list[int]:
        return [
            (bulk(work, *beads) if (n + turn) % 2 else work.patch(f"{BEADS}/old", {"title": f"{turn}"})).status
            for turn in range(20)
        ]

    with ThreadPoolExecutor(8) as threads:
        assert Counter(status for each in threads.map(make, range(8)) for status in each) == {201: 80, 200: 80}
    assert sql(deadlocks) == before
    assert counters(sql)["old"] == [80, 0]
    assert_counted(sql)


# Comments


def test_a_discussion_is_kept_in_its_order(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    bead(work, "y")
    first = make(work, f"{BEADS}/x/comments", content="first", author_id="ann")
    assert {"id", "bead_id", "author_id", "author_username", "content", "created_at", "updated_at", "edited"} <= {
        *first
    }
    assert (first["bead_id"], first["author_id"], first["edited"]) == ("x", "ann", False)
    reply = make(work, f"{BEADS}/x/comments", content="reply", parent_id=first["id"])
    make(work, f"{BEADS}/x/comments", content="again", parent_id=reply["id"])
    make(work, f"{BEADS}/x/comments", content="second")
    found = work.get(f"{BEADS}/x/comments").json
    assert found["bead_id"] == "x"
    assert [comment["content"] for comment in found["comments"]] == ["first", "second"]
    assert found["comments"][0]["replies"][0]["replies"][0]["content"] == "again"
    assert work.get(f"{BEADS}/y/comments").json == {"bead_id": "y", "comments": []}
    assert get(work, "x")["version"] == 1, "a remark changes nothing"
    for path, parent in ((f"{BEADS}/y", first["id"]), (f"{BEADS}/x", "nothing")):
        answer = work.post(f"{path}/comments", {"content": "c", "parent_id": parent})
        assert assert_problem(answer, 400, "invalid")["errors"][0]["field"] == "parent_id"
    for body, field in (
        ({}, "content"),
        ({"content": 1}, "content"),
        ({"content": "c", "author_id": "a\n"}, "author_id"),
    ):
        answer = work.post(f"{BEADS}/x/comments", body)
        assert assert_problem(answer, 400, "invalid")["errors"][0]["field"] == field
    assert work.post(f"{BEADS}/z/comments", {"content": "c"}).status == 404
    assert work.get(f"{BEADS}/z/comments").status == 404
    assert_counted(sql)


def test_remarks_go_with_their_bead(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    make(work, f"{BEADS}/x/comments", content="c", parent_id=make(work, f"{BEADS}/x/comments", content="c")["id"])
    work.delete(f"{BEADS}/x")
    bead(work, "x")
    assert work.get(f"{BEADS}/x/comments").json["comments"] == []
    assert sql("SELECT * FROM comments") == []
    assert_counted(sql)


def test_a_very_long_thread_of_replies_can_be_read(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    sql(
        "INSERT INTO comments (id, entity_type, entity_id, project_id, parent_id, content)"
        "  SELECT 'c' || n, 'bead', 'x', 'p', CASE WHEN n > 1 THEN 'c' || n - 1 END, n FROM generate_series(1, 3000) n"
    )
    answer = work.get(f"{BEADS}/x/comments")
    assert answer.status == 200
    assert all(f'"content":"{n}"'.encode() in answer.body for n in (1, 1500, 3000))


def test_a_remark_is_not_lost_on_a_bead_that_goes_meanwhile(
    work: AppClient, sql: Sql, session: Callable[[], Any]
) -> None:
    bead(work, "x")
    with session() as conn, conn.cursor() as cursor, ThreadPoolExecutor(1) as thread:
        cursor.execute("DELETE FROM beads WHERE id = 'x'")
        late = thread.submit(work.post, f"{BEADS}/x/comments", {"content": "c"})
        time.sleep(0.2)
        conn.commit()
        assert late.result().status in (400, 404)
    assert sql("SELECT * FROM comments") == []
