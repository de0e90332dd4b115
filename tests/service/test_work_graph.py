"""Who looks at the work graph sees every bead and what lies between them, however many there are."""

from __future__ import annotations

from typing import Any

import pytest
from harness import AppClient
from harness.locks import Sql, assert_problem, instant
from harness.work import bead, claim, complete, get, make, team

WORK_GRAPH = "/api/v1/work-graph"


def graph(client: AppClient, query: str = "") -> dict[str, Any]:
    answer = client.get(WORK_GRAPH + query)
    assert answer.status == 200, answer
    assert {*answer.json} == {"beads", "edges", "updated_at"}
    return answer.json


def edges(found: dict[str, Any]) -> set[tuple[str, str, str]]:
    assert all({*edge} == {"from", "to", "relationship"} for edge in found["edges"])
    named = [(edge["from"], edge["relationship"], edge["to"]) for edge in found["edges"]]
    assert len({*named}) == len(named)
    return {*named}


@pytest.fixture
def work(client: AppClient) -> AppClient:
    team(client, "a")
    make(client, "/api/v1/projects", id="q", name="q", git_repo="r", branch="b")
    return client


def test_edges_lead_from_the_blocker_from_the_parent_and_from_who_names_the_other(work: AppClient) -> None:
    bead(work, "epic")
    bead(work, "first", parent="epic", tags=["t"])
    bead(work, "second", parent="epic", blocked_by=["first"])
    bead(work, "last", blocked_by=["first", "second"], related_to=["epic", "gone"])
    found = graph(work)
    assert found["beads"] == {key: get(work, key) for key in ("epic", "first", "second", "last")}
    assert edges(found) == {
        ("epic", "parent", "first"),
        ("epic", "parent", "second"),
        ("first", "blocks", "second"),
        ("first", "blocks", "last"),
        ("second", "blocks", "last"),
        ("last", "related", "epic"),
        ("last", "related", "gone"),
    }


def test_the_graph_is_as_old_as_it_says(work: AppClient, sql: Sql) -> None:
    assert {**graph(work), "updated_at": ""} == {"beads": {}, "edges": [], "updated_at": ""}
    bead(work, "x")
    token = claim(work, "x")
    before = sql("SELECT clock_timestamp()")[0][0]
    complete(work, "x", token)
    found = graph(work)
    assert found["beads"]["x"]["status"] == "closed"
    assert before < instant(found["updated_at"]) < sql("SELECT clock_timestamp()")[0][0]


def test_the_graph_of_a_project_names_what_is_beyond_it(work: AppClient) -> None:
    bead(work, "x", project_id="q")
    bead(work, "y", blocked_by=["x"])
    assert edges(graph(work, "?project_id=p")) == {("x", "blocks", "y")}
    assert {*graph(work, "?project_id=p")["beads"]} == {"y"}
    assert {*graph(work, "?project_id=q")["beads"]} == {"x"}
    assert edges(graph(work, "?project_id=q")) == set()
    assert graph(work, "?project_id=none")["beads"] == {}
    assert {*graph(work, "?project_id=")["beads"]} == {"x", "y"}
    assert_problem(work.get(WORK_GRAPH + "?project_id=a%00b"), 400, "invalid")
    assert work.post(WORK_GRAPH, {}).status == 405


def test_pages_of_a_graph_are_the_whole(work: AppClient) -> None:
    for n in range(7):
        bead(work, f"b{n}", blocked_by=[f"b{m}" for m in range(1, n)], parent="b0" if n else None)
    beads, found, target = {}, set(), WORK_GRAPH + "?project_id=p&limit=3"
    for left in (3, 3, 1):
        answer = work.get(target)
        assert len(answer.json["beads"]) == left
        beads |= answer.json["beads"]
        assert not found & edges(answer.json)
        found |= edges(answer.json)
        target = answer.headers.get("Link", "").partition(">")[0][1:]
    assert not target
    assert beads == graph(work)["beads"]
    assert found == edges(graph(work))


def test_a_graph_beyond_ten_thousand_beads_has_a_link_to_the_rest(work: AppClient, sql: Sql) -> None:
    sql(
        "INSERT INTO beads (id, title, project_id)"
        " SELECT 'b' || lpad(n::text, 5, '0'), 't', 'p' FROM generate_series(0, 10000) n"
    )
    answer = work.get(WORK_GRAPH)
    assert len(answer.json["beads"]) == 10_000
    rest = work.get(answer.headers["Link"].partition(">")[0][1:])
    assert {*rest.json["beads"]} == {"b10000"}
    assert "Link" not in rest.headers
