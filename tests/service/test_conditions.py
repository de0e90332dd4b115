"""No request is served against its If-Match or If-None-Match: RFC 9110, but that weak tags match in both."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import AppClient
from harness.entities import KINDS, PROVIDERS, Kind, entity
from harness.locks import assert_problem
from harness.work import BEADS, bead, team

CONFIG = Kind("config", "/api/v1/config/x", {"value": 1}, "value", "value")
UPSERTS = {"provider": ("POST", PROVIDERS), "config": ("PUT", CONFIG.path)}  # the call that makes or changes it
WHOLE = (
    ("PUT", "/api/v1/config", {"agents": {"max_concurrent": 3}}),
    ("POST", "/api/v1/config/import.yaml", b"k: 1"),
    ("POST", "/api/v1/beads/bulk", {"beads": [{"title": "t", "project_id": "p"}]}),
)
MALFORMED = ("", " ", ",", '"', '"1', '1"', "1", "garbage", '*, "1"', '"1", *', '"1" "2"', 'w/"1"', "W/1", '"a b"')

each_kind = pytest.mark.parametrize("kind", [*KINDS, CONFIG], ids=lambda kind: kind.name)


def make(client: AppClient, kind: Kind) -> dict[str, Any]:
    if kind is CONFIG:
        assert client.put(kind.path, kind.new).status == 200
    else:
        entity(client, kind)
    return client.get(kind.path).json


def writes(kind: Kind) -> list[tuple[str, str, Any]]:
    """Each way to write what is there."""
    ways: list[tuple[str, str, Any]] = [("PUT", kind.path, {kind.text: "a"}), ("DELETE", kind.path, None)]
    if kind is not CONFIG:
        ways.append(("PATCH", kind.path, {kind.text: "a"}))
    if kind.name == "provider":
        ways.append(("POST", kind.list, {"id": "x", kind.text: "a"}))
    return ways


def given(if_match: str | None, if_none_match: str | None) -> dict[str, str]:
    headers = {"If-Match": if_match, "If-None-Match": if_none_match}
    return {name: value for name, value in headers.items() if value is not None}


MET = [
    ("*", None),
    ('"1"', None),
    ('W/"1"', None),
    ('"7" , ,W/"x", "1",', None),
    (None, '"7"'),
    (None, '"01"'),
    (None, '""'),
    (" * ", '"7", "8"'),
]
REFUSED = [
    ('"7"', None),
    ('"01"', None),
    ('"x", "*", "\xff"', None),
    (None, "*"),
    (None, '"1"'),
    (None, '"7", W/"1"'),
    ("*", "*"),
    ('"1"', '"1"'),
    ('"7"', '"8"'),
]


@each_kind
def test_a_write_of_what_is_there_happens_only_under_its_conditions(client: AppClient, kind: Kind) -> None:
    for method, path, body in writes(kind):
        before = make(client, kind)
        assert before["version"] == 1
        for pair in REFUSED:
            answer = client.request(method, path, body, given(*pair))
            assert_problem(answer, 412, "stale", current=before)
            assert client.get(kind.path).json == before, (method, pair)
        for pair in MET:
            answer = client.request(method, path, body, given(*pair))
            assert answer.status < 300, (method, pair, answer)
            client.delete(kind.path)
            make(client, kind)
        client.delete(kind.path)


@each_kind
def test_what_is_not_there_is_made_only_when_it_need_not_be_there(client: AppClient, kind: Kind) -> None:
    make(client, kind)
    client.delete(kind.path)
    method, path = UPSERTS.get(kind.name, ("POST", kind.list))
    for pair in (("*", None), ('"1"', None), ('W/"1"', '"7"'), ("*", "*")):
        answer = client.request(method, path, kind.new, given(*pair))
        assert_problem(answer, 412, "stale", current=None)
        assert client.get(kind.path).status == 404, pair
        for other, where, body in writes(kind):
            if (other, where) != (method, path):
                assert_problem(client.request(other, where, body, given(*pair)), 404, "not-found")
    for pair in ((None, "*"), (None, '"1"'), (None, None)):
        answer = client.request(method, path, kind.new, given(*pair))
        assert (answer.status, answer.json["version"]) == (200 if kind is CONFIG else 201, 1), pair
        client.delete(kind.path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name not in UPSERTS], ids=lambda kind: kind.name)
def test_an_id_that_is_taken_is_a_conflict_under_any_condition(client: AppClient, kind: Kind) -> None:
    make(client, kind)
    for pair in ((None, "*"), ("*", None), ('"7"', None), (None, '"7"')):
        assert_problem(client.post(kind.list, kind.new, headers=given(*pair)), 409, "taken")


def test_a_provider_whose_id_loom_makes_is_there_before_nobody(client: AppClient) -> None:
    assert client.post(PROVIDERS, {"name": "n"}, headers=given(None, "*")).status == 201
    assert_problem(client.post(PROVIDERS, {"name": "n"}, headers=given("*", None)), 412, "stale", current=None)


@each_kind
def test_a_read_obeys_its_conditions(client: AppClient, kind: Kind) -> None:
    make(client, kind)
    client.put(kind.path, {kind.text: "b"}, headers={"Loom-Actor": "ann"})
    now = client.get(kind.path).json
    assert now["version"] == 2
    for pair, status in (
        (("*", None), 200),
        (('"1", W/"2"', None), 200),
        ((None, '"1"'), 200),
        ((None, "*"), 304),
        ((None, 'W/"2"'), 304),
        (("*", '"1", "2"'), 304),
        (('"1"', None), 412),
        (('"1"', '"2"'), 412),
    ):
        read, head = (client.request(method, kind.path, None, given(*pair)) for method in ("GET", "HEAD"))
        assert (read.status, head.status, head.body) == (status, status, b""), pair
        if status == 412:
            problem = assert_problem(read, 412, "stale", current=now)
            assert problem["changed_by"][kind.text] == "ann"
        else:
            assert read.headers["ETag"] == head.headers["ETag"] == '"2"'
            assert (read.body == b"") == (status == 304)
    client.delete(kind.path)
    for pair in (("*", None), ('"1"', None), (None, "*")):
        assert client.get(kind.path, headers=given(*pair)).status == 404


def test_if_match_is_looked_at_first(client: AppClient) -> None:
    make(client, KINDS[0])
    client.patch(KINDS[0].path, {"model": "theirs"}, headers={"Loom-Actor": "ann"})
    both = client.put(KINDS[0].path, {"model": "m"}, headers=given('"1"', '"2"'))
    assert_problem(both, 412, "stale", changed=["model"], changed_by={"model": "ann"})
    other = client.put(KINDS[0].path, {"model": "m"}, headers=given('"2"', '"2"'))
    assert "If-None-Match" in assert_problem(other, 412, "stale", changed=None, changed_by=None)["detail"]


def test_a_merge_obeys_if_none_match(client: AppClient) -> None:
    make(client, KINDS[0])
    client.patch(KINDS[0].path, {"endpoint": "theirs"})
    merge = {"Prefer": "conflict=merge"}
    assert_problem(
        client.patch(KINDS[0].path, {"model": "m"}, headers={**merge, **given('"1"', '"2"')}),
        412,
        "stale",
        changed=None,
    )
    assert client.patch(KINDS[0].path, {"model": "m"}, headers={**merge, **given('"1"', '"3"')}).status == 200


@each_kind
def test_a_malformed_condition_is_refused_before_anything_is_looked_at(client: AppClient, kind: Kind) -> None:
    for there in (False, True):
        if there:
            make(client, kind)
        for method, path, body in [*writes(kind), ("GET", kind.path, None)]:
            for header in ("If-Match", "If-None-Match"):
                for bad in MALFORMED:
                    refused = client.request(method, path, body, {header: bad})
                    (error,) = assert_problem(refused, 400, "invalid")["errors"]
                    assert error["field"] == header, (method, bad)
    assert client.get(kind.path).json["version"] == 1


def test_a_malformed_condition_is_refused_before_a_replay(client: AppClient) -> None:
    team(client)
    for kind in (KINDS[0], KINDS[3]):
        key = {"Idempotency-Key": kind.name}
        first = client.post(kind.list, kind.new, headers={**key, "If-None-Match": "*"})
        assert first.status == 201
        assert client.post(kind.list, kind.new, headers={**key, "If-None-Match": "*"}).body == first.body
        for header in ("If-Match", "If-None-Match"):
            refused = client.post(kind.list, kind.new, headers={**key, header: '"1'})
            assert assert_problem(refused, 400, "invalid")["errors"][0]["field"] == header


@pytest.mark.parametrize(("method", "path", "body"), WHOLE, ids=["settings", "import", "bulk"])
def test_what_writes_several_entities_takes_no_condition_rather_than_ignoring_it(
    client: AppClient, method: str, path: str, body: Any
) -> None:
    team(client)
    bead(client, "x")
    config, beads = client.get("/api/v1/config").json, client.get(BEADS).json
    for header, value in (("If-Match", "*"), ("If-None-Match", "*"), ("If-Match", '"1"'), ("If-None-Match", '"1')):
        refused = client.request(method, path, body, {header: value})
        assert assert_problem(refused, 400, "invalid")["errors"][0]["field"] == header
    assert (client.get("/api/v1/config").json, client.get(BEADS).json) == (config, beads)
    assert client.request(method, path, body).status < 300


@pytest.mark.parametrize("kind", [KINDS[0], CONFIG], ids=lambda kind: kind.name)
def test_of_twenty_that_create_one_thing_exactly_one_does(client: AppClient, kind: Kind, long: bool) -> None:
    method, path = UPSERTS[kind.name]
    begin = threading.Barrier(20)

    def create(n: int) -> tuple[int, Any]:
        begin.wait()
        body = {**kind.new, kind.text: f"{n}"}
        answer = client.request(method, path, body, {"If-None-Match": "*"})
        return answer.status, answer.json if answer.status < 300 else answer.json["current"]

    with ThreadPoolExecutor(20) as threads:
        for _ in range(200 if long else 10):
            answers = list(threads.map(create, range(20)))
            assert Counter(status for status, _ in answers) == {200 if kind is CONFIG else 201: 1, 412: 19}
            made = client.get(kind.path).json
            assert made["version"] == 1
            assert all(told == made for _, told in answers)
            client.delete(kind.path)
