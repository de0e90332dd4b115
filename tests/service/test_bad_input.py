"""Bad input is answered by a 4xx that names the field, never by a 500, and none of it is stored."""

from __future__ import annotations

import gzip
import json
from urllib.parse import quote

import pytest
from harness import AppClient
from harness.client import Answer
from harness.locks import BUILD, LOCKS, Sql, acquire, assert_problem

STORED = """
    SELECT 'lock' FROM distributed_locks
    UNION ALL SELECT 'grant' FROM grants
    UNION ALL SELECT 'place' FROM lock_waiters
"""
DRAWN = "SELECT last_value, is_called FROM fencing_tokens"

ACQUIRE: list[tuple[str, str]] = [  # the body, the field that the answer names
    ('{"ttl_seconds": 0}', "ttl_seconds"),
    ('{"ttl_seconds": 86401}', "ttl_seconds"),
    ('{"ttl_seconds": -1}', "ttl_seconds"),
    ('{"ttl_seconds": 1.0}', "ttl_seconds"),
    ('{"ttl_seconds": 1.5}', "ttl_seconds"),
    ('{"ttl_seconds": 1e3}', "ttl_seconds"),
    ('{"ttl_seconds": "30"}', "ttl_seconds"),
    ('{"ttl_seconds": true}', "ttl_seconds"),
    ('{"ttl_seconds": null}', "ttl_seconds"),
    ('{"ttl_seconds": [30]}', "ttl_seconds"),
    ('{"ttl_seconds": 9223372036854775808}', "ttl_seconds"),
    ('{"ttl_seconds": 18446744073709551616}', "ttl_seconds"),
    ('{"ttl_seconds": ' + "9" * 1000 + "}", "ttl_seconds"),
    ('{"wait_seconds": -1}', "wait_seconds"),
    ('{"wait_seconds": 31}', "wait_seconds"),
    ('{"wait_seconds": "0"}', "wait_seconds"),
    ('{"wait_seconds": 0.5}', "wait_seconds"),
    ('{"owner": ""}', "owner"),
    ('{"owner": 7}', "owner"),
    ('{"owner": {"name": "a"}}', "owner"),
    (json.dumps({"owner": "x" * 256}), "owner"),
    ('{"owner": "a\\u0000b"}', "owner"),
    ('{"owner": "instance:6ba7b810-9dad-11d1-80b4-00c04fd430c8"}', "owner"),
    ('{"metadata": []}', "metadata"),
    ('{"metadata": "text"}', "metadata"),
    ('{"metadata": 1}', "metadata"),
    (json.dumps({"metadata": {"text": "x" * 8192}}), "metadata"),
    (json.dumps({"metadata": {"text": "ü" * 4096}}, ensure_ascii=False), "metadata"),
    ('{"metadata": {"a": "\\u0000"}}', "metadata.a"),
    ('{"metadata": {"a": {"b": ["x", "\\u0000"]}}}', "metadata.a.b[1]"),
    ('{"metadata": {"a\\u0000": 1}}', "metadata.a\\u0000"),
    ('{"metadata": {"a": 1, "a": 2}}', "metadata.a"),
    ('{"owner": "a", "owner": "b"}', "owner"),
    ('{"metadata": {"n": 1' + "0" * 309 + "}}", "metadata.n"),
    ('{"metadata": {"n": -1' + "0" * 309 + "}}", "metadata.n"),
    ('{"metadata": {"n": [1, {"m": -' + "9" * 4000 + "}]}}", "metadata.n[1].m"),
    ('{"metadata": {"n": ' + "9" * 5000 + "}}", "metadata.n"),
    ('{"metadata": {"n": 1e999}}', "metadata.n"),
    ('{"unknown": 1}', "unknown"),
    ('{"fencing_token": 1}', "fencing_token"),
    ('{"ttl": 30}', "ttl"),
    ("[]", "body"),
    ("null", "body"),
    ('"text"', "body"),
    ("30", "body"),
]
RENEW: list[tuple[str, str]] = [
    ("", "fencing_token"),
    ("{}", "fencing_token"),
    ('{"fencing_token": null}', "fencing_token"),
    ('{"fencing_token": "1"}', "fencing_token"),
    ('{"fencing_token": 1.0}', "fencing_token"),
    ('{"fencing_token": true}', "fencing_token"),
    ('{"fencing_token": 0}', "fencing_token"),
    ('{"fencing_token": -1}', "fencing_token"),
    ('{"fencing_token": 9007199254740992}', "fencing_token"),
    ('{"fencing_token": 9223372036854775808}', "fencing_token"),
    ('{"fencing_token": 1, "ttl_seconds": 0}', "ttl_seconds"),
    ('{"fencing_token": 1, "ttl_seconds": 86401}', "ttl_seconds"),
    ('{"fencing_token": 1, "owner": "a"}', "owner"),
]
NOT_JSON = [
    b"{",
    b"{'owner': 'a'}",
    b'{"owner": "a"} trailing',
    b'{"owner": "a",}',
    b'{"ttl_seconds": NaN}',
    b'{"metadata": {"n": Infinity}}',
    b'{"ttl_seconds": 030}',
    b'{"owner": "\xff"}',
    b'{"owner": "\xc3\x28"}',
    b'{"owner": "\xed\xa0\x80"}',
    b'\xef\xbb\xbf{"owner": "a"}',
    b'{"owner": "a\x00b"}',
    b'{"owner": "line\nfeed"}',
    b"\x00",
    b"owner=a&ttl_seconds=30",
    '{"owner": "a"}'.encode("utf-16"),
    b'{"owner": "half a pair \\ud800"}',
    b'{"metadata": {"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}}",
    b'{"metadata": {"a": ' + b'{"a": ' * 90_000 + b"1" + b"}" * 90_001 + b"}",
]
QUERIES = [
    ("DELETE", f"{BUILD}?fencing_token=abc", "fencing_token"),
    ("DELETE", f"{BUILD}?fencing_token=0", "fencing_token"),
    ("DELETE", f"{BUILD}?fencing_token=-1", "fencing_token"),
    ("DELETE", f"{BUILD}?fencing_token=1.0", "fencing_token"),
    ("DELETE", f"{BUILD}?fencing_token=1e3", "fencing_token"),
    ("DELETE", f"{BUILD}?fencing_token=+1", "fencing_token"),
    ("DELETE", f"{BUILD}?fencing_token=%D9%A1", "fencing_token"),
    ("DELETE", f"{BUILD}?fencing_token=9007199254740992", "fencing_token"),
    ("DELETE", f"{BUILD}?fencing_token={'9' * 5000}", "fencing_token"),
    ("DELETE", f"{BUILD}?fencing_token=1&force=yes", "force"),
    ("DELETE", f"{BUILD}?fencing_token=1&force=1", "force"),
    ("DELETE", f"{BUILD}?fencing_token=1&force=", "force"),
    ("DELETE", f"{BUILD}?fencing_token=1&force=true&reason=%00", "reason"),
    ("DELETE", f"{BUILD}?fencing_token=1&force=true&reason={'x' * 1001}", "reason"),
    ("GET", "/api/v1/locks?limit=0", "limit"),
    ("GET", "/api/v1/locks?limit=10001", "limit"),
    ("GET", "/api/v1/locks?limit=ten", "limit"),
    ("GET", "/api/v1/locks?limit=1&after=!!!", "after"),
    ("GET", "/api/v1/locks?after=%FF", "after"),
    ("GET", "/api/v1/locks?after=MTIz", "after"),  # a number: a cursor of /grants
    ("GET", "/api/v1/locks?after=IgAi", "after"),
    ("GET", "/api/v1/locks?after=IlwAIg", "after"),
    ("GET", "/api/v1/locks?after=Ilx1MDAwMCI", "after"),  # an escaped NUL
    ("GET", "/api/v1/locks?after=Ilx1ZDgwMCI", "after"),  # half a surrogate pair
    ("GET", "/api/v1/locks?prefix=%00", "prefix"),
    ("GET", f"/api/v1/locks?prefix={'x' * 256}", "prefix"),
    ("GET", "/api/v1/locks?owner=%00", "owner"),
    ("GET", "/api/v1/grants?limit=-1", "limit"),
    ("GET", "/api/v1/grants?owner=a%00", "owner"),
    ("GET", "/api/v1/grants?lock_name=%0A", "lock_name"),
    ("GET", "/api/v1/grants?after=ImEi", "after"),  # a text: a cursor of /locks
    ("GET", "/api/v1/grants?after=e30", "after"),
    ("GET", "/api/v1/grants?after=dHJ1ZQ", "after"),
    ("GET", "/api/v1/grants?after=MS41", "after"),
    ("GET", f"/api/v1/grants?after={'W1tb' * 1500}", "after"),  # [[[[...
]


def assert_names(answer: Answer, field: str, case: object) -> None:
    assert answer.status == 400, case
    problem = assert_problem(answer, 400, "invalid")
    assert [error["field"] for error in problem["errors"]] == [field], case
    assert problem["errors"][0]["problem"]
    assert problem["detail"]


def test_a_bad_body_of_acquire_names_its_field_and_takes_no_lock(client: AppClient, sql: Sql) -> None:
    drawn = sql(DRAWN)
    for body, field in ACQUIRE:
        assert_names(client.post(BUILD, body.encode()), field, body)
    assert sql(STORED) == []
    assert sql(DRAWN) == drawn


def test_a_bad_body_of_renew_names_its_field_and_changes_nothing(client: AppClient) -> None:
    held = acquire(client)
    for body, field in RENEW:
        body = body.replace(": 1,", f": {held['fencing_token']},")
        assert_names(client.put(BUILD, body.encode()), field, body)
    assert client.get(BUILD).json == {**held, "waiting": 0}


def test_a_body_that_is_not_json_gets_the_error_that_older_clients_know(client: AppClient, sql: Sql) -> None:
    for body in NOT_JSON:
        answer = client.post(BUILD, body)
        assert answer.status == 400, body[:80]
        assert_problem(answer, 400, "invalid", error="Invalid request body")
    assert sql(STORED) == []


def test_a_bad_query_names_its_parameter(client: AppClient, sql: Sql) -> None:
    held = acquire(client)
    for method, path, field in QUERIES:
        assert_names(client.request(method, path), field, path[:80])
    assert client.get(BUILD).json == {**held, "waiting": 0}


def test_a_huge_body_is_refused_unread(client: AppClient, sql: Sql) -> None:
    body = b'{"owner": "' + b"a" * 1024 * 1024 + b'"}'
    assert_problem(client.post(BUILD, body), 413, "too-large")
    assert sql(STORED) == []


def test_values_at_the_limits_are_stored_unchanged(client: AppClient) -> None:
    metadata = {
        "text": "x" * 7900,
        "numbers": [2**63, -(10**100), 0.1, 1e-7, 1e15],
        "words": [True, False, None],
        "deep": [[[[[[[[["🔒 \u0001 \\ \" '"]]]]]]]]],
        "": {"empty key": {}},
    }
    owner = "🔒" * 255
    answer = client.post(BUILD, {"owner": owner, "ttl_seconds": 86400, "wait_seconds": 30, "metadata": metadata})
    assert answer.status == 201
    assert (answer.json["owner"], answer.json["metadata"]) == (owner, metadata)
    assert client.get(BUILD).json["metadata"] == metadata


def test_a_body_needs_no_content_type(client: AppClient) -> None:
    for i, kind in enumerate(
        ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "nonsense", ""]
    ):
        answer = client.post(f"{LOCKS}{i}", {"owner": "a"}, headers={"Content-Type": kind})
        assert (answer.status, answer.json["owner"]) == (201, "a"), kind


@pytest.mark.parametrize(
    ("method", "path", "status", "word"),
    [
        ("GET", "/nothing/here", 404, "not-found"),
        ("GET", "/api/v1/nothing", 404, "not-found"),
        ("GET", "/api/v1/locks-and-more", 404, "not-found"),
        ("PATCH", BUILD, 405, "method-not-allowed"),
        ("POST", "/api/v1/locks", 405, "method-not-allowed"),
        ("DELETE", "/api/v1/instances", 405, "method-not-allowed"),
        ("POST", "/health", 405, "method-not-allowed"),
    ],
)
def test_a_wrong_path_or_method_is_a_problem_like_any_other(
    client: AppClient, method: str, path: str, status: int, word: str
) -> None:
    answer = client.request(method, path)
    assert_problem(answer, status, word)
    assert ("Allow" in answer.headers) == (status == 405)


def test_an_answer_carries_the_request_id_that_was_sent(client: AppClient) -> None:
    for path in ("/health", BUILD, "/nothing"):
        assert client.get(path, headers={"X-Request-ID": "r-1"}).headers["X-Request-ID"] == "r-1"


BULK = b'{"beads": [{"title": "t", "project_id": "p", "context": {"a": {"b": "\\u0000"}}}]}'


def fields(answer: Answer) -> list[str]:
    return [error["field"] for error in assert_problem(answer, 400, "invalid")["errors"]]


@pytest.mark.parametrize(
    ("path", "body", "missing"),
    [
        ("/projects", {}, ["name", "git_repo", "branch"]),
        ("/projects", {"name": "", "branch": "b"}, ["name", "git_repo"]),
        ("/agents", {}, ["persona_name", "project_id"]),
        ("/beads", {"description": "d"}, ["title", "project_id"]),
        ("/file-locks", {}, ["file_path", "project_id", "agent_id"]),
        ("/projects/p/comments", {}, ["author_id", "comment"]),
        (
            "/beads/bulk",
            {"beads": [{"title": "t"}, {}]},
            ["beads[0].project_id", "beads[1].title", "beads[1].project_id"],
        ),
    ],
)
def test_all_missing_fields_are_named_at_once(client: AppClient, path: str, body: object, missing: list[str]) -> None:
    answer = client.post("/api/v1" + path, body)
    assert fields(answer) == missing
    assert all(field in answer.json["error"] for field in missing)


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("PATCH", "/beads/x", b'{"context": {"title": "\\u0000"}}', "context.title"),
        ("PATCH", "/beads/x", b'{"tags": ["a", "\\u0000"]}', "tags[1]"),
        ("PATCH", "/beads/x", b'{"tags": ["a", 1]}', "tags[1]"),
        ("POST", "/beads", b'{"attributes": {"a": [{"b": {"c": 1, "c": 2}}]}}', "attributes.a[0].b.c"),
        ("POST", "/beads/bulk", BULK, "beads[0].context.a.b"),
        ("POST", "/agents/x/heartbeat", b'{"claims": {"b1": 1, "b2": "x"}}', "claims.b2"),
        ("PUT", "/config/k", b'{"value": [{"a": ["\\u0000"]}]}', "value[0].a[0]"),
        ("POST", "/config/import.yaml", b"k: {a: [1, {b: .inf}]}", "k.a[1].b"),
    ],
)
def test_an_error_names_the_whole_path_of_its_field(
    client: AppClient, method: str, path: str, body: bytes, field: str
) -> None:
    assert fields(client.request(method, "/api/v1" + path, body)) == [field]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/beads"), ("PUT", "/config/k"), ("POST", "/config/import.yaml")]
)
def test_a_compressed_body_is_refused_as_that(client: AppClient, method: str, path: str) -> None:
    body = gzip.compress(b'{"value": 1}')
    answer = client.request(method, "/api/v1" + path, body, headers={"Content-Encoding": "gzip"})
    assert_problem(answer, 415, "compressed")
    answer = client.request(method, "/api/v1" + path, b'{"value": 1}', headers={"Content-Encoding": "identity"})
    assert answer.status != 415


def test_an_answer_without_a_body_has_no_type(client: AppClient) -> None:
    token = acquire(client)["fencing_token"]
    gone = client.delete(f"{BUILD}?fencing_token={token}")
    client.put("/api/v1/config/k", {"value": 1})
    same = client.get("/api/v1/config/k", headers={"If-None-Match": '"1"'})
    for answer, status in ((gone, 204), (same, 304), (client.request("OPTIONS", BUILD), 200)):
        assert (answer.status, answer.body, answer.headers.get("Content-Type")) == (status, b"", None)


def test_a_name_has_one_form(client: AppClient) -> None:
    """A letter may be one character or two. A file's path is normalized; a name in the other form is refused."""
    one, two = "caf\u00e9", "cafe\u0301"
    assert client.post(LOCKS + quote(one), {}).status == 201
    assert fields(client.post(LOCKS + quote(two), {})) == ["lock_name"]
    fence = {"Loom-Lock-Token": f'1; lock="{quote(two)}"'}
    assert fields(client.put("/api/v1/config/k", {"value": 1}, headers=fence)) == ["Loom-Lock-Token"]
    assert client.put(f"/api/v1/config/{quote(one)}", {"value": 1}).status == 200
    assert fields(client.put(f"/api/v1/config/{quote(two)}", {"value": 1})) == [two]
    assert client.post("/api/v1/providers", {"id": one}).status == 201
    assert fields(client.post("/api/v1/providers", {"id": two})) == ["id"]
    new = {"title": two, "project_id": "p"}
    assert fields(client.post("/api/v1/beads/bulk", {"beads": [new, {"id": two, **new}]})) == ["beads[1].id"]
    assert client.get(f"/api/v1/providers/{quote(two)}").status == 404
