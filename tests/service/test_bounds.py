"""Everything that a client can make grow has a bound: a refused request says which, and an answer ends at it."""

from __future__ import annotations

import base64
import re
import time
from typing import Any

import pytest
from harness import AppClient
from harness.client import Answer
from harness.entities import KINDS, PROJECTS, Kind, entity
from harness.locks import Sql, assert_problem
from harness.work import AGENTS, BEADS, PROJECT, bead, claim, complete, get, make, patch, team

from loom.bounds import bounds

EVENTS = "/api/v1/events"
OBJECTS = {"provider": "metrics", "project": "context", "agent": "persona", "bead": "context"}
KIB, MIB = 1024, 1024 * 1024


def pages(client: AppClient, path: str) -> list[list[Any]]:
    """All pages of a list, each as long as it may be."""
    found, answer = [], client.get(path)
    while True:
        assert answer.status == 200, answer
        assert len(answer.body) < bounds.page_bytes + 2 * MIB
        found.append(answer.json)
        if "Link" not in answer.headers:
            return found
        answer = client.get(re.match("<(.*)>", answer.headers["Link"])[1])  # type: ignore[index]


def test_the_database_has_the_same_bounds_as_the_program(sql: Sql) -> None:
    (text,) = sql("SELECT prosrc FROM pg_proc WHERE proname = 'bound'")[0]
    names = re.findall("WHEN '([a-z_]+)'", text)
    assert {"entity", "references", "shared_keys", "shared_value", "shared_values"} <= set(names)
    for name in names:
        assert sql("SELECT bound(%s)", name) == [(getattr(bounds, name),)]


# Entities


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_number_of_patches_makes_an_entity_larger_than_its_bound(client: AppClient, kind: Kind) -> None:
    entity(client, kind)
    answers = [client.patch(kind.path, {OBJECTS[kind.name]: {f"k{n}": "x" * 300_000}}) for n in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 413]
    body = assert_problem(answers[-1], 413, "too-large")
    assert (body["kind"], body["id"], body["most"]) == (kind.name, "x", MIB)
    assert body["size"] > 1_200_000
    assert {*client.get(kind.path).json[OBJECTS[kind.name]]} == {"k0", "k1", "k2"}, "a refused patch has no effect"
    assert client.patch(kind.path, {"attributes": {"a": "y" * 300_000}}).status == 413
    assert client.patch(kind.path, {OBJECTS[kind.name]: {"k0": None}}).status == 200
    assert client.patch(kind.path, {OBJECTS[kind.name]: {"k3": "x" * 300_000}}).status == 200


def test_a_body_has_a_bounded_number_of_values(client: AppClient) -> None:
    """Each takes up to 100 bytes of memory: without this bound, eight bodies of 1 MiB need 350 MiB."""
    team(client)
    bead(client, "bd-1")
    for form in (b"[%b1]", b'{"b": [%b1]}', b'{"b": {"c": [[%b1]]}}'):
        for value in (b"1,", b"[],", b"{},"):
            answer = client.patch(f"{BEADS}/bd-1", b'{"context": {"a": ' + form % (value * bounds.values) + b"}}")
            assert "100000 values" in assert_problem(answer, 413, "too-large")["detail"]
    text = ",[{" * 100_000
    assert patch(client, "bd-1", description=text, context={"a": [1] * 90_000})["description"] == text


def test_a_fault_in_a_large_body_is_named_in_bounded_time(client: AppClient) -> None:
    started = time.monotonic()
    keys = b",".join(b'"%d": 1' % n for n in range(90_000))
    answer = client.patch(f"{BEADS}/bd-1", b'{"context": {' + keys + b', "last": "\\u0000"}}')
    assert assert_problem(answer, 400, "invalid")["errors"][0]["field"] == "context.last"
    assert time.monotonic() - started < 5


def test_completing_a_bead_does_not_make_it_larger_than_its_bound(client: AppClient) -> None:
    team(client, "a")
    bead(client, "bd-1", context={"k": "x" * 700_000})
    token = claim(client, "bd-1")
    assert_problem(complete(client, "bd-1", token, context={"l": "x" * 700_000}), 413, "too-large")
    assert get(client, "bd-1")["fencing_token"] == token, "the claim goes on"
    assert complete(client, "bd-1", token, context={"l": 1}).status == 200


def test_a_number_counts_with_the_digits_that_it_is_answered_with(client: AppClient) -> None:
    team(client)
    bead(client, "bd-1")
    numbers = b"1e300," * 3000
    answer = client.patch(f"{BEADS}/bd-1", b'{"context": {"n": [' + numbers + b"1]}}")
    assert answer.status == 200
    assert len(answer.body) > 900_000
    assert client.patch(f"{BEADS}/bd-1", b'{"context": {"m": [' + numbers + b"1]}}").status == 413


def test_an_entity_that_is_larger_already_can_be_closed_and_made_smaller(client: AppClient, sql: Sql) -> None:
    team(client, "a")
    bead(client, "bd-1", assigned_to="a")
    sql("ALTER TABLE beads DISABLE TRIGGER USER")
    sql("UPDATE beads SET context = jsonb_build_object('k', repeat('x', 2000000), 'l', repeat('y', 900000))")
    sql("ALTER TABLE beads ENABLE TRIGGER USER")
    assert client.patch(f"{BEADS}/bd-1", {"context": {"m": 1}}).status == 413
    assert client.delete(f"{AGENTS}/a").status == 204
    assert patch(client, "bd-1", status="closed")["status"] == "closed"
    assert patch(client, "bd-1", context={"l": None})["context"].keys() == {"k"}


def test_a_bead_waits_for_a_bounded_number_of_others(client: AppClient, sql: Sql) -> None:
    team(client)
    bead(client, "bd-1")
    sql("INSERT INTO beads (id, title, project_id) SELECT 'b' || n, 't', 'p' FROM generate_series(1, 1001) AS n")
    every = [f"b{n}" for n in range(1, 1001)]
    assert client.patch(f"{BEADS}/bd-1", {"blocked_by": [*every, "b1001"]}).status == 400
    assert len(patch(client, "bd-1", blocked_by=every)["blocked_by"]) == 1000
    body = assert_problem(client.patch(f"{BEADS}/b1001", {"blocks": ["bd-1"]}), 400, "invalid")
    assert (body["errors"][0]["field"], "1000" in body["detail"]) == ("blocked_by", True)
    assert client.delete(f"{BEADS}/b1").status == 204
    assert len(patch(client, "b1001", blocks=["bd-1"])["blocks"]) == 1


# Events


def changes(client: AppClient, path: str) -> list[dict[str, Any]]:
    """The changes of an entity's versions, oldest first."""
    return [event["changes"] for event in client.get(path + "/history").json][::-1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_event_holds_only_the_keys_of_an_object_that_changed(client: AppClient, kind: Kind) -> None:
    entity(client, kind)
    name = OBJECTS[kind.name]
    client.patch(kind.path, {name: {"big": "x" * 500_000, "deep": {"big": "y" * 400_000, "small": 1}, "gone": [1]}})
    for n in range(5):
        assert client.patch(kind.path, {name: {"n": n, "deep": {"small": None}}}).status == 200
    client.put(kind.path, {name: {**client.get(kind.path).json[name], "gone": [2]}})
    client.patch(kind.path, {name: {"gone": None}})
    _, _, *small = changes(client, kind.path)
    assert small == [
        {name: {"n": 0, "deep": {"small": None}}},
        *({name: {"n": n}} for n in range(1, 5)),
        {name: {"gone": [2]}},
        {name: {"gone": None}},
    ]
    feed = client.get(EVENTS + "?after=0").json["events"]
    assert len(client.get(EVENTS + f"?after={feed[-8]['id']}").body) < 10_000
    assert feed[-1]["data"] == {f"{kind.name}_id": "x", **({"project_id": "x"} if kind.name == "project" else {})} or (
        feed[-1]["data"] == {f"{kind.name}_id": "x", "project_id": PROJECT}
    )


def test_the_event_of_a_completed_bead_holds_only_what_the_completion_adds(client: AppClient) -> None:
    team(client, "a")
    bead(client, "bd-1", context={"big": "x" * 500_000, "same": 1})
    complete(client, "bd-1", claim(client, "bd-1"), context={"same": 1, "new": 2})
    assert changes(client, f"{BEADS}/bd-1")[-1]["context"] == {"new": 2}


def test_a_shared_value_is_in_its_event_as_a_whole(client: AppClient) -> None:
    for value in ({"a": 1, "b": 2}, {"a": 1}):
        client.put("/api/v1/config/k", {"value": value})
        assert changes(client, "/api/v1/config/k")[-1]["value"] == value


# Pages


def large_beads(sql: Sql, count: int = 40) -> set[str]:
    """Beads of 500 KB each; some have a character of four bytes, which takes four times as much in Python's memory."""
    sql(
        "INSERT INTO beads (id, title, project_id, context) SELECT 'b' || n, 't', 'p',"
        " jsonb_build_object('k', repeat('x', 500000) || CASE WHEN n % 2 = 0 THEN chr(128512) ELSE '' END)"
        f"  FROM generate_series(1, {count}) AS n"
    )
    return {f"b{n}" for n in range(1, count + 1)}


def test_a_list_ends_at_a_number_of_bytes_and_its_link_leads_on(client: AppClient, sql: Sql) -> None:
    team(client)
    ids = large_beads(sql)
    found = pages(client, BEADS)
    assert [len(page) for page in found] == [16, 16, 8]
    assert [each["id"] for page in found for each in page] == sorted(ids)
    assert [len(page) for page in pages(client, BEADS + "?limit=10")] == [10] * 4
    assert [len(page) for page in pages(client, BEADS + "?status=open,closed&type=task")] == [16, 16, 8]
    graph = pages(client, "/api/v1/work-graph")
    assert [key for page in graph for key in page["beads"]] == sorted(ids)  # type: ignore[call-overload]


def test_a_page_of_events_ends_at_a_number_of_bytes_and_no_event_is_lost(client: AppClient, sql: Sql) -> None:
    team(client)
    ids = large_beads(sql)
    found: list[str] = []
    cursor, answered = 0, -1
    while answered:
        answer = client.get(f"{EVENTS}?after={cursor}&limit=1000")
        assert len(answer.body) < bounds.page_bytes + MIB
        cursor, answered = answer.json["next"], answer.json["count"]
        found += [event["entity_id"] for event in answer.json["events"]]
    assert sorted(found) == sorted({*ids, PROJECT})
    latest = client.get(f"{EVENTS}?limit=1000")
    assert latest.json["events"][-1]["id"] == latest.json["next"]
    assert (latest.json["count"], len(latest.body) < bounds.page_bytes + MIB) == (16, True)


def test_the_history_of_an_entity_ends_at_a_number_of_bytes(client: AppClient) -> None:
    team(client)
    bead(client, "bd-1")
    for n in range(20):
        patch(client, "bd-1", description=str(n) + "x" * 900_000)
    found = [event["version"] for page in pages(client, f"{BEADS}/bd-1/history") for event in page]
    assert found == list(range(21, 0, -1))


@pytest.mark.parametrize(
    ("path", "key"), [("/api/v1/locks", "lock_name"), ("/api/v1/grants", "fencing_token")], ids=["locks", "grants"]
)
def test_a_list_of_grants_ends_at_a_number_of_bytes(client: AppClient, sql: Sql, path: str, key: str) -> None:
    sql(
        "SELECT acquire_lock('l' || n, 'me', NULL, INTERVAL '1 hour', jsonb_build_object('k', repeat('x', 8000)),"
        "                    false) FROM generate_series(1, 2500) AS n"
    )
    found = pages(client, path)
    assert len(found) == 3
    assert len({each[key] for page in found for each in page}) == 2500


@pytest.mark.parametrize("path", [f"{PROJECTS}/{PROJECT}", f"{BEADS}/bd-1"], ids=["project", "bead"])
def test_comments_have_pages(client: AppClient, path: str) -> None:
    team(client)
    bead(client, "bd-1")
    text = "content" if "beads" in path else "comment"
    made = [make(client, path + "/comments", author_id="a", **{text: "x"})["id"] for _ in range(5)]
    if "beads" in path:
        made.append(make(client, path + "/comments", content="x", parent_id=made[1])["id"])

    def seen(query: str) -> list[list[str]]:
        found = [page["comments"] if isinstance(page, dict) else page for page in pages(client, path + query)]
        return [[each["id"] for comment in page for each in (comment, *comment.get("replies", ()))] for page in found]

    assert seen("/comments?limit=2") == [made[n : n + 2] for n in range(0, len(made), 2)]
    assert sorted(seen("/comments")[0]) == sorted(made)
    assert "comments" not in client.get(path).json
    for _ in range(12):
        make(client, path + "/comments", author_id="a", **{text: "x" * 900_000})
    assert [len(page) for page in seen("/comments")] == [len(made) + 9, 3]


def test_a_cursor_of_another_list_is_refused(client: AppClient) -> None:
    team(client)
    for path, cursor in ((f"{PROJECTS}/{PROJECT}/comments", '["x","y"]'), (BEADS, '["x"]')):
        answer: Answer = client.get(f"{path}?after={base64.urlsafe_b64encode(cursor.encode()).decode()}")
        assert answer.status == 400, answer
