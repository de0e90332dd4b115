"""A misspelt query parameter is refused: if it were ignored, a filter would return everything or a wait end at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask
from harness import AppClient
from harness.client import Answer
from harness.contract import document, resolved
from harness.locks import BUILD, Sql, acquire, assert_problem
from harness.work import AGENTS, BEADS, PROJECT, bead, claim, get, team

API = "/api/v1/"
# One value for each parameter that an operation requires.
REQUIRED = {"fencing_token": "1", "agent_id": "a"}


def operations() -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Yield each operation's method, a path, and its query parameters in the contract, all and the required ones."""
    for template, item in document()["paths"].items():
        for method in item.keys() - {"parameters"}:
            told = [resolved(each) for each in [*item.get("parameters", ()), *item[method].get("parameters", ())]]
            query = [each for each in told if each["in"] == "query"]
            names = [each["name"] for each in query]
            assert len(names) == len(set(names)), (method, template)
            required = [each["name"] for each in query if each.get("required")]
            yield method.upper(), re.sub("{[^}]*}", "x", template), names, required


def fault(answer: Answer, case: Any) -> dict[str, Any]:
    assert answer.status == 400, (case, answer)
    (found,) = assert_problem(answer, 400, "invalid")["errors"]
    return found


def test_an_unknown_parameter_is_refused_with_the_parameters_of_the_contract(client: AppClient) -> None:
    checked = 0
    for method, path, names, _ in operations():
        if path.startswith(API):
            for query in ("nonsense=1", "nonsense", "limit=1&nonsense=1" if "limit" in names else "nonsense=&x=1"):
                wrong = fault(client.request(method, f"{path}?{query}"), (method, path))
                assert (wrong["field"], wrong["allowed"]) == ("nonsense", sorted(names)), (method, path)
            checked += 1
    assert checked > 50


def test_each_parameter_of_the_contract_is_checked_and_may_be_given_once(client: AppClient) -> None:
    """No parameter may have a control character as its value."""
    checked = set()
    for method, path, names, required in operations():
        for name in names:
            rest = "".join(f"&{each}={REQUIRED[each]}" for each in required if each != name)
            wrong = fault(client.request(method, f"{path}?{name}=%01{rest}"), (method, path, name))
            assert wrong["field"] == name, (method, path, wrong)
            assert wrong["problem"] != "is not a known parameter"
            twice = fault(client.request(method, f"{path}?{name}=1&{name}=1{rest}"), (method, path, name))
            assert (twice["field"], twice["problem"]) == (name, "is given twice"), (method, path)
            checked.add(name)
    assert checked >= {"limit", "after", "force", "reason", "wait_seconds", "prefix", "status", "project_id"}


def test_a_write_with_an_unknown_parameter_changes_nothing(client: AppClient, sql: Sql) -> None:
    team(client, "a")
    bead(client, "x")
    token = claim(client, "x")
    held = acquire(client)
    stored = "SELECT (SELECT count(*) FROM events), (SELECT count(*) FROM grants), (SELECT count(*) FROM comments)"
    before = sql(stored), get(client, "x"), client.get(BUILD).json
    for method, path, body in (
        ("POST", "/api/v1/locks/other?wait=1", {}),
        ("PUT", f"{BUILD}?ttl_seconds=1", {"fencing_token": held["fencing_token"]}),
        ("DELETE", f"{BUILD}?fencing_token={held['fencing_token']}&forced=true", None),
        ("POST", f"{BEADS}?dry_run=true", {"id": "y", "title": "y", "project_id": PROJECT}),
        ("PUT", f"{BEADS}/x?dry_run=true", {"title": "changed"}),
        ("PATCH", f"{BEADS}/x?if_version=7", {"title": "changed"}),
        ("DELETE", f"{BEADS}/x?if_version=7", None),
        ("POST", f"{BEADS}/bulk?dry_run=true", {"beads": [{"title": "y", "project_id": PROJECT}]}),
        ("POST", f"{BEADS}/claim?project_id=p", {"agent_id": "a"}),
        ("DELETE", f"{BEADS}/x/claim?fencing_token={token}&why=late", None),
        ("POST", f"{AGENTS}/a/heartbeat?claims=none", {}),
        ("POST", "/api/v1/file-locks?bead_id=x", {"file_path": "f", "project_id": PROJECT, "agent_id": "a"}),
        ("PUT", "/api/v1/config/k?value=2", {"value": 1}),
        ("POST", "/api/v1/config/import.yaml?dry_run=true", b"k: 1"),
    ):
        for headers in ({}, {"Idempotency-Key": "k", "If-Match": "*"}):
            fault(client.request(method, path, body, headers=headers), (method, path))
    assert (sql(stored), get(client, "x"), client.get(BUILD).json) == before
    assert sql("SELECT count(*) FROM idempotency_keys") == [(0,)]


@pytest.mark.parametrize(
    "query", ["stat=open", "Status=open", "status%00=open", "status=open&status=closed", "%FF=1", "=1"]
)
def test_a_misspelt_filter_is_refused(client: AppClient, query: str) -> None:
    team(client, "a")
    bead(client, "x")
    for method in ("GET", "HEAD"):
        assert client.request(method, f"{BEADS}?{query}").status == 400


def test_health_and_the_contract_accept_any_parameter(client: AppClient) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/api/openapi.yaml"):
        assert client.get(f"{path}?probe=1&probe=2").status == 200, path


def test_an_unknown_parameter_does_not_change_other_refusals(client: AppClient, app: Flask) -> None:
    assert_problem(client.get("/api/v1/nothing?nonsense=1"), 404, "not-found")
    assert_problem(client.request("PATCH", f"{BUILD}?nonsense=1"), 405, "method-not-allowed")
    answer = client.request("OPTIONS", f"{BEADS}?nonsense=1")
    assert (answer.status, "GET" in answer.headers["Allow"]) == (200, True)
    for query in ("", "&", "status=&limit="):
        assert client.get(f"/api/v1/instances?{query}").status == (200 if query in ("", "&") else 400)


def test_the_link_to_the_next_page_has_only_known_parameters(client: AppClient) -> None:
    team(client, "a", "b", "c")
    path, seen = f"{AGENTS}?status=idle&limit=1", []
    while path:
        answer = client.get(path)
        assert answer.status == 200
        seen += [each["id"] for each in answer.json]
        path = answer.headers.get("Link", "")[1:].partition(">")[0]
    assert seen == ["a", "b", "c"]
