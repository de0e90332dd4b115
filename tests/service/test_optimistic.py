"""No lost update: a write made from a stale version never overwrites, and its author learns who changed what."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pytest
from harness import AppClient
from harness.client import Answer
from harness.entities import KINDS, PROVIDERS, Kind, entity
from harness.locks import Sql, assert_problem
from harness.work import BEADS, assert_counted, bead, claim, fail, team

ROUNDS = 1000

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def seen(version: int | str, **more: str) -> dict[str, str]:
    """Headers of who has seen a version."""
    return {"If-Match": f'"{version}"', **more}


def assert_version(answer: Answer, version: int, status: int = 200) -> dict[str, Any]:
    assert (answer.status, answer.json["version"], answer.headers["ETag"]) == (status, version, f'"{version}"'), answer
    return answer.json


@each_kind
def test_versions_begin_at_one_and_grow_by_one(client: AppClient, sql: Sql, kind: Kind) -> None:
    entity(client, kind)
    assert_version(client.get(kind.path), 1)
    assert_version(client.patch(kind.path, {kind.text: "a"}), 2)
    assert_version(client.put(kind.path, {kind.text: "b"}), 3)
    assert_version(client.put(kind.path, {}), 3)
    assert_version(client.get(kind.path), 3)
    assert client.delete(kind.path).status == 204
    assert client.get(kind.path).status == client.delete(kind.path).status == client.put(kind.path, {}).status == 404
    assert_version(client.post(kind.list, kind.new), 1, 201)
    assert_counted(sql)


@each_kind
def test_who_has_the_current_version_is_not_sent_it_again(client: AppClient, kind: Kind) -> None:
    entity(client, kind)
    for tags in ('"1"', 'W/"1"', '"7", "1"', "*"):
        answer = client.get(kind.path, headers={"If-None-Match": tags})
        assert (answer.status, answer.body, answer.headers["ETag"]) == (304, b"", '"1"'), tags
    client.patch(kind.path, {kind.text: "a"})
    assert client.get(kind.path, headers={"If-None-Match": '"1"'}).json[kind.text] == "a"


@each_kind
def test_every_version_says_who_made_it_of_what_and_when(client: AppClient, kind: Kind) -> None:
    entity(client, kind)
    client.patch(kind.path, {kind.text: "theirs"}, headers={"Loom-Actor": "ann"})
    client.put(kind.path, {kind.other: "ours"}, headers={"Loom-Actor": "bob", "X-Request-ID": "r1"})
    client.delete(kind.path, headers={"Loom-Actor": "eve"})
    gone, last, change, first = client.get(kind.path + "/history").json
    assert [event["version"] for event in (gone, last, change, first)] == [4, 3, 2, 1]
    assert (change["actor"], change["changes"]) == ("ann", {kind.text: "theirs"})
    assert (last["actor"], last["changes"], last["request_id"]) == ("bob", {kind.other: "ours"}, "r1")
    assert (gone["actor"], gone["type"]) == ("eve", f"{kind.name}.deleted")
    assert first["timestamp"] < change["timestamp"] < last["timestamp"] < gone["timestamp"]
    page = client.get(kind.path + "/history?limit=3")
    assert client.get(page.headers["Link"].partition(">")[0][1:]).json == [first]


def test_a_link_leads_on_whatever_the_id(client: AppClient) -> None:
    for key in ("日本", "a%41", 'q?x#y>; rel="z"', "a b"):
        path = f"{PROVIDERS}/{quote(key)}"
        assert client.post(PROVIDERS, {"id": key, "name": "n"}).status == 201
        client.patch(path, {"name": "m"})
        link = client.get(f"{path}/history?limit=1").headers["Link"]
        assert link.isascii()
        assert [event["entity_id"] for event in client.get(link.partition(">")[0][1:]).json] == [key]


def test_how_a_claim_ended_is_no_field_that_was_changed(client: AppClient) -> None:
    team(client, "a")
    bead(client, "x")
    token = claim(client, "x")
    assert fail(client, "x", token, reason="no").status == 200
    stale = client.patch(f"{BEADS}/x", {"title": "t"}, headers={"If-Match": '"2"'})
    changed = assert_problem(stale, 412, "stale")["changed"]
    assert "attempts" in changed
    assert not {"claim_ended", "reason"} & {*changed}


@each_kind
def test_a_stale_write_is_refused_and_told_who_changed_what(client: AppClient, kind: Kind) -> None:
    entity(client, kind)
    client.patch(kind.path, {kind.text: "theirs", kind.other: "theirs"}, headers={"Loom-Actor": "ann"})
    client.patch(kind.path, {kind.other: "theirs"}, headers={"Loom-Actor": "bob"})
    current = client.patch(kind.path, {kind.other: "again"}, headers={"Loom-Actor": "cy"}).json
    for method, body in (("PUT", {kind.text: "mine"}), ("PATCH", {kind.text: "mine"}), ("DELETE", None)):
        answer = client.request(method, kind.path, body, seen(1))
        problem = assert_problem(answer, 412, "stale", current=current, changed=sorted([kind.text, kind.other]))
        assert problem["changed_by"] == {kind.text: "ann", kind.other: "cy"}
    assert assert_problem(client.delete(kind.path, headers=seen(3)), 412, "stale")["changed_by"] == {kind.other: "cy"}
    assert client.get(kind.path).json == current
    assert client.delete(kind.path, headers=seen(4)).status == 204


@each_kind
def test_without_if_match_the_last_writer_wins(client: AppClient, kind: Kind) -> None:
    entity(client, kind)
    client.patch(kind.path, {kind.text: "first"})
    assert_version(client.patch(kind.path, {kind.text: "last"}), 3)
    assert_version(client.patch(kind.path, {kind.text: "star"}, headers={"If-Match": "*"}), 4)
    assert client.get(kind.path).json[kind.text] == "star"


def test_which_tags_match(client: AppClient) -> None:
    entity(client, KINDS[0])
    path, version = KINDS[0].path, 1
    for tags in ('"{}"', 'W/"{}"', '"999", "{}"', '"x", W/"y", "{}"'):
        answer = client.patch(path, {"model": tags}, headers={"If-Match": tags.format(version)})
        version = assert_version(answer, version + 1)["version"]
    for tags in (
        '"0"',
        '"-1"',
        '"1.0"',
        '"99999999999999999999"',
        '"7"',
        '"x"',
        '"1", "2"',
        '"٣"',
        '""',
        '"1", W/""',
    ):
        headers = {"If-Match": tags.encode().decode("latin-1")}
        assert_problem(client.patch(path, {"model": "m"}, headers=headers), 412, "stale")
        assert_problem(client.delete(path, headers=headers), 412, "stale")
    for tags in ("", " ", ",", '"', '"1', "garbage", str(version)):
        problem = assert_problem(client.put(path, {"model": "m"}, headers={"If-Match": tags}), 400, "invalid")
        assert problem["errors"][0]["field"] == "If-Match"
    assert client.get(path).json["version"] == version


def test_a_registration_from_a_version_does_not_overwrite_a_later_one_or_revive(client: AppClient) -> None:
    entity(client, KINDS[0])
    assert_version(client.post(PROVIDERS, {"id": "x", "model": "m"}, headers=seen(1)), 2, 201)
    assert_problem(client.post(PROVIDERS, {"id": "x", "model": "n"}, headers=seen(1)), 412, "stale")
    client.delete(KINDS[0].path)
    assert_problem(client.post(PROVIDERS, {"id": "x", "model": "n"}, headers=seen(2)), 412, "stale", current=None)
    assert client.get(KINDS[0].path).status == 404


MERGE = {"Prefer": "conflict=merge"}


@each_kind
def test_a_merge_applies_when_nobody_else_touched_those_fields(client: AppClient, kind: Kind) -> None:
    entity(client, kind)
    client.patch(kind.path, {kind.other: "theirs"})
    merged = assert_version(client.patch(kind.path, {kind.text: "mine"}, headers=seen(1, **MERGE)), 3)
    assert (merged[kind.text], merged[kind.other]) == ("mine", "theirs")
    answer = client.patch(kind.path, {kind.text: "again", kind.other: "again"}, headers=seen(1, **MERGE))
    problem = assert_problem(answer, 412, "stale", conflicting=sorted([kind.text, kind.other]))
    assert problem["current"] == client.get(kind.path).json == merged
    answer = client.patch(kind.path, {kind.text: "mine", kind.other: "again"}, headers=seen(2, **MERGE))
    assert_problem(answer, 412, "stale", conflicting=[kind.text], changed=[kind.text])


def test_only_a_patch_is_merged(client: AppClient) -> None:
    entity(client, KINDS[0])
    client.patch(KINDS[0].path, {"endpoint": "theirs"})
    assert client.put(KINDS[0].path, {"model": "mine"}, headers=seen(1, **MERGE)).status == 412
    assert client.delete(KINDS[0].path, headers=seen(1, **MERGE)).status == 412


def test_a_merge_is_refused_when_it_is_not_known_any_more_what_has_changed(client: AppClient, sql: Sql) -> None:
    entity(client, KINDS[0])
    client.patch(KINDS[0].path, {"endpoint": "theirs"})
    client.patch(KINDS[0].path, {"endpoint": "again"})
    sql("DELETE FROM events WHERE entity_type = 'provider' AND version <= 2")
    answer = client.patch(KINDS[0].path, {"model": "mine"}, headers=seen(1, **MERGE))
    assert_problem(answer, 412, "stale", changed=None, changed_by=None)
    merged = client.patch(KINDS[0].path, {"model": "mine"}, headers=seen(2, **MERGE))
    assert_version(merged, 4)  # of what came later, all is known, though its creation is forgotten


def test_a_merge_does_not_take_an_earlier_life_of_the_id_for_this_one(client: AppClient) -> None:
    kind = KINDS[0]
    entity(client, kind)
    client.patch(kind.path, {"endpoint": "before"})
    client.delete(kind.path)
    entity(client, kind)
    client.patch(kind.path, {"description": "d"}, headers={"Loom-Actor": "ann"})
    problem = assert_problem(client.patch(kind.path, {"model": "m"}, headers=seen(1)), 412, "stale")
    assert problem["changed_by"] == {"description": "ann"}
    assert client.patch(kind.path, {"endpoint": "m"}, headers=seen(1, **MERGE)).status == 200


@each_kind
def test_of_two_writers_with_the_same_version_one_wins(client: AppClient, sql: Sql, kind: Kind, long: bool) -> None:
    rounds = ROUNDS if long else ROUNDS // 5
    entity(client, kind)
    begin, outcomes = threading.Barrier(2), Counter[tuple[int, ...]]()

    def write(name: str) -> list[Answer]:
        answers = []
        for n in range(rounds):
            begin.wait()
            method = "PATCH" if n % 2 else "PUT"
            answers.append(client.request(method, kind.path, {kind.text: f"{name}{n}"}, seen(n + 1)))
            begin.wait()
        return answers

    with ThreadPoolExecutor(2) as threads:
        for n, pair in enumerate(zip(*threads.map(write, "ab"), strict=True)):
            outcomes[tuple(sorted(answer.status for answer in pair))] += 1
            won, lost = sorted(pair, key=lambda answer: answer.status)
            assert lost.json["current"] == won.json, n
    assert outcomes == {(200, 412): rounds}
    assert client.get(kind.path).json["version"] == rounds + 1
    assert_counted(sql)


# A PUT or DELETE that nginx sends again, and a client that uses one request id again


def sent_by_nginx(proxy_request_id: str, **more: str) -> dict[str, str]:
    """Headers as they reach an instance, the client's own among them."""
    return {"Loom-Proxy-Request-ID": proxy_request_id, **more}


@each_kind
def test_a_put_that_nginx_repeats_is_answered_as_the_first_time(client: AppClient, sql: Sql, kind: Kind) -> None:
    entity(client, kind)
    for version, tags in ((1, {}), (2, seen(2))):
        headers, body = sent_by_nginx(f"n{version}", **tags), {kind.text: f"v{version}"}
        first = client.put(kind.path, body, headers=headers)
        assert_version(first, version + 1)
        assert client.put(kind.path, body, headers=headers).repeats(first)
    client.patch(kind.path, {kind.text: "later"})
    again = client.put(kind.path, {kind.text: "v2"}, headers=sent_by_nginx("n2", **seen(2)))
    assert_problem(again, 412, "stale")
    assert_counted(sql)


@each_kind
def test_a_delete_that_nginx_repeats_is_answered_as_the_first_time(client: AppClient, sql: Sql, kind: Kind) -> None:
    for n, tags in enumerate(({}, seen(1))):
        entity(client, kind)
        headers = sent_by_nginx(f"n{n}", **tags)
        assert [client.delete(kind.path, headers=headers).status for _ in range(2)] == [204, 204]
        assert client.delete(kind.path, headers=sent_by_nginx("other")).status == 404
        assert client.delete(kind.path).status == 404
    entity(client, kind)
    assert client.delete(kind.path, headers=sent_by_nginx("n1")).status == 204
    assert client.get(kind.path).status == 404, "made again since: there is something to delete"
    assert_counted(sql)


@each_kind
def test_one_request_id_for_all_that_a_client_does_swallows_no_write(client: AppClient, sql: Sql, kind: Kind) -> None:
    mine = {"X-Request-ID": "my-whole-work"}
    for _ in range(2):
        entity(client, kind)
        for text in "abba":
            assert client.put(kind.path, {kind.text: text}, headers=mine).json[kind.text] == text
        assert_version(client.put(kind.path, {kind.text: "a"}, headers=mine), 6)
        client.put(kind.path, {kind.text: "theirs"}, headers={"X-Request-ID": "other"})
        assert_version(client.put(kind.path, {kind.text: "a"}, headers=mine), 8)
        assert client.delete(kind.path, headers=mine).status == 204
        assert client.delete(kind.path, headers=mine).status == 404
        assert client.put(kind.path, {kind.text: "a"}, headers=mine).status == 404
    assert_counted(sql)


def test_what_nginx_repeats_is_told_to_nobody(client: AppClient) -> None:
    entity(client, KINDS[0])
    headers = sent_by_nginx("nginx-1", **{"X-Request-ID": "mine"})
    answers = [client.put(KINDS[0].path, {"model": "m"}, headers=headers), client.get("/api/v1/events?after=0")]
    answers.append(client.get(KINDS[0].path + "/history"))
    for answer in answers:
        assert b"nginx-1" not in answer.body
        assert b"proxy_request_id" not in answer.body
    assert answers[-1].json[0]["request_id"] == "mine"


def test_a_repeated_put_of_lists_times_and_dependencies_makes_no_second_version(client: AppClient, sql: Sql) -> None:
    entity(client, KINDS[3])
    for key in "ab":
        client.post(BEADS, {"id": key, "title": key, "project_id": "p"})
    body = {
        "due_date": "2030-01-01T01:00:00+01:00",
        "blocked_by": ["a", "a"],
        "blocks": ["b", "b"],
        "tags": ["t", "t"],
        "context": {"k": {"n": 1.50}, "null": None},
        "status": "closed",
    }
    answers = [client.put(BEADS + "/x", body, headers=sent_by_nginx("n")) for _ in range(2)]
    assert answers[1].repeats(answers[0])
    assert_version(answers[1], 2)
    assert client.get(BEADS + "/b").json["version"] == 2
    assert_counted(sql)


def test_a_repeated_write_is_told_though_what_it_presented_has_ended_with_it(client: AppClient) -> None:
    """Closing a bead ends its claim, and with that the file lock that fenced the write."""
    team(client, "a")
    bead(client, "x")
    claim(client, "x")
    file = {"file_path": "f", "project_id": "p", "agent_id": "a", "bead_id": "x"}
    lock = client.post("/api/v1/file-locks", file).json
    token = f'{lock["fencing_token"]}; lock="{quote(lock["lock_name"])}"'
    headers = sent_by_nginx("n", **{"Loom-Lock-Token": token})
    first = client.put(f"{BEADS}/x", {"status": "closed"}, headers=headers)
    assert_version(first, 3)
    assert client.put(f"{BEADS}/x", {"status": "closed"}, headers=headers).repeats(first)
    assert_problem(client.put(f"{BEADS}/x", {"title": "t"}, headers={"Loom-Lock-Token": token}), 409, "lock-lost")
