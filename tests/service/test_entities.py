"""Shared state is what its writers gave: what cannot be kept is refused by name, and nothing of it is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import psycopg2
import pytest
from harness import AppClient, wait_until
from harness.client import Answer
from harness.entities import KINDS, PROJECTS, PROVIDERS, Kind, entity
from harness.locks import Sql, assert_problem, instant
from harness.work import AGENTS, BEADS, PROJECT, assert_counted, bead, get, make, team

from loom import db
from loom.state import entities
from loom.state.beads import Bead

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)

NO_TEXT = [1, 1.5, True, [], {}]
BAD: dict[str, dict[str, list[Any]]] = {  # of each kind, values that a field cannot have
    "provider": {
        "name": [None, "", "x" * 1001, *NO_TEXT],
        "status": [None, "", "done", "PENDING", 1],
        "model": [None, *NO_TEXT],
        "model_score": [None, "1", True],
        "cost_per_mtoken": [-0.1, None],
        "context_window": [-1, 1.0, "1", 2**53, 2**63, None],
        "last_heartbeat_at": ["2026-01-01T00:00:00", "soon", 1.5, ""],
        "is_shared": [None, 1, "true"],
        "tags": [None, "x", [1], [None], ["x" * 256], ["x"] * 1001],
        "attributes": [None, [], "x"],
        "gpu_constraints": [[], "x"],
        "requires_key": ["yes"],
    },
    "project": {
        "name": [None, *NO_TEXT],
        "bead_prefix": [None, "a/b", "a\n", "x" * 101, "..", "a\u0085b"],
        "parent_id": [1, "x" * 201, "nobody"],
        "status": [None, "done", "in_progress"],
        "git_strategy": ["merge"],
        "git_auth_method": ["password"],
        "due_date": ["2026-13-01T00:00:00Z", "2026-01-01", 1.5],
        "is_sticky": [None, "no", 0],
        "context": [None, [], "x"],
    },
    "agent": {
        "name": [None, "", "x" * 1001],
        "persona_name": [None, "", 7, "x" * 993],
        "status": [None, "", "busy"],
        "provider_id": [7, "x" * 201, "nobody"],
        "project_id": [7, "nobody"],
        "persona": [[], "x", 7],
        "capabilities": [None, [7]],
    },
    "bead": {
        "title": [None, "", "x" * 1001, 7],
        "type": [None, "", "x" * 65],
        "status": [None, "", "done"],
        "priority": [None, -1, 5, 1.0, "1", True, 2**64],
        "project_id": [None, "", "nobody", "x" * 201],
        "assigned_to": [7, "nobody", "x" * 1_000],
        "parent": ["nobody", 7],
        "blocked_by": [None, "x", ["nobody"], [""], ["x" * 201], ["a\n"], [None], ["x"] * 1001],
        "blocks": [None, ["nobody"]],
        "children": [None, ["nobody"]],
        "related_to": [None, ["a/b"]],
        "tags": [None, [7]],
        "context": [None, [], "x"],
        "due_date": [
            "2026-01-01T00:00:00",
            "2026-02-30T00:00:00Z",
            "infinity",
            "9999-12-31T23:59:59-00:01",
            "0001-01-01T00:00:00+00:01",
            "10000-01-01T00:00:00Z",
            "-0044-03-15T00:00:00Z",
            0.5,
        ],
        "estimated_time": [-1, 1.5, "1", 2**53],
    },
}
ALLOWED = {
    ("provider", "status"): {"pending", "active", "error"},
    ("project", "status"): {"open", "closed", "reopened"},
    ("project", "git_strategy"): {"direct", "branch-pr"},
    ("project", "git_auth_method"): {"none", "ssh", "token", "basic", "git-helper"},
    ("agent", "status"): {"paused", "idle", "working", "deciding", "blocked", "dead"},
    ("bead", "status"): {"open", "in_progress", "blocked", "deferred", "closed"},
}
NO_ID = ["", "a/b", ".", "..", "a\nb", "a\n", "a\x7f", "a\u0085", "x" * 201, "\ufffd", 7, None, [], {}]
STORED = "SELECT count(*), (SELECT count(*) FROM events) FROM projects, providers, agents, beads"


def fields(answer: Answer) -> list[str]:
    return [error["field"] for error in assert_problem(answer, 400, "invalid")["errors"]]


def everything(sql: Sql) -> list[Any]:
    return [
        sql(f"SELECT to_jsonb(t) FROM {table} t ORDER BY 1")
        for table in ("projects", "providers", "agents", "beads", "bead_blockers", "comments", "events")
    ]


@each_kind
def test_a_bad_value_is_named_and_nothing_is_stored(client: AppClient, sql: Sql, kind: Kind) -> None:
    entity(client, kind)
    before = everything(sql)
    for field, values in BAD[kind.name].items():
        for value in values:
            new = {**kind.new, "id": "y", field: value}
            calls = [(client.patch, kind.path, {kind.text: "new", field: value}), (client.post, kind.list, new)]
            if kind.name != "project" or value != "":  # which leaves the field as it is there, as in the original
                calls.append((client.put, kind.path, {kind.text: "new", field: value}))
            for call, path, body in calls:
                if kind.ignores(call.__name__.upper(), field, value):
                    continue
                answer = call(path, body)
                named = fields(answer)[0]
                assert named == field or named.startswith(f"{field}["), (body, answer)
                allowed = ALLOWED.get((kind.name, field))
                if allowed and isinstance(value, str) and value:
                    assert {*answer.json["errors"][0]["allowed"]} - {""} == allowed
                assert len(answer.body) < 3000, "it does not give back what was sent"
    assert everything(sql) == before


@each_kind
def test_a_bad_id_is_refused_wherever_it_stands(client: AppClient, sql: Sql, kind: Kind) -> None:
    entity(client, kind)
    before = everything(sql)
    for bad in NO_ID:
        if bad is None:  # no id, as for the original
            continue
        assert fields(client.post(kind.list, {**kind.new, "id": bad})) == ["id"], bad
    for raw in ("a%0Ab", "a%0A", "%00", "%7F", "%C2%85", "%FF", "%C3%28", "%ED%A0%80", "x" * 201, "%EF%BF%BD"):
        for method, body in (("GET", None), ("PUT", {}), ("PATCH", {}), ("DELETE", None)):
            answer = client.request(method, f"{kind.list}/{raw}", body)
            assert answer.status == 404 or fields(answer) == ["id"], (method, raw, answer)
    for raw in ("a%2Fb", "a/b", "%2F", ""):
        assert client.delete(f"{kind.list}/{raw}").status in (404, 405)
    assert everything(sql) == before


@each_kind
def test_whatever_may_be_an_id_reaches_its_entity(client: AppClient, kind: Kind) -> None:
    entity(client, kind)
    for key in (
        "a b (c)",
        "ü:ö",
        "a%2Fb",
        "%",
        "?x=1",
        "#",
        "..a",
        "'; DROP",
        "\\",
        '"',
        "🧵",
        "bulk",
        "claim",
        "+",
        "x" * 200,
    ):
        if kind.name == "bead" and key in ("bulk", "claim"):  # paths of their own
            assert fields(client.post(kind.list, {**kind.new, "id": key})) == ["id"]
            continue
        assert make(client, kind.list, **{**kind.new, "id": key})["id"] == key
        path = f"{kind.list}/{quote(key, safe='')}"
        assert client.get(path).json["id"] == key
        assert client.patch(path, {kind.text: key}).json[kind.text] == key
        assert key in [each["id"] for each in client.get(kind.list).json]
        assert client.delete(path).status == 204
        assert client.get(path).status == 404


def test_an_id_made_of_a_name_fits_into_a_path(client: AppClient) -> None:
    team(client)
    for name in ("a/b", "..", "line\nfeed", "x" * 1000, "\ufffd", "tab\tand/slash", " "):
        for path, body in (
            (PROVIDERS, {"name": name}),
            (AGENTS, {"name": name, "persona_name": "w", "project_id": PROJECT}),
        ):
            made = make(client, path, **body)
            assert made["name"] == name
            assert client.get(f"{path}/{quote(made['id'], safe='')}").json == made
    first = make(client, PROVIDERS, name="gpt")
    second = make(client, PROVIDERS, name="gpt", api_key="secret")
    assert (first["id"], second["id"]) == ("gpt", "gpt-2")
    assert (second["requires_key"], second["key_id"]) == (True, "gpt-2-api-key")


def test_agents_of_one_name_that_come_at_once_all_get_an_id(client: AppClient, sql: Sql) -> None:
    team(client)
    with ThreadPoolExecutor(8) as threads:
        body = {"name": "w", "persona_name": "w", "project_id": PROJECT}
        made = list(threads.map(lambda _: client.post(AGENTS, body), range(64)))
    assert {answer.status for answer in made} == {201}
    assert len({answer.json["id"] for answer in made}) == 64
    assert_counted(sql)


@each_kind
def test_what_is_no_json_is_refused_and_nothing_is_stored(client: AppClient, sql: Sql, kind: Kind) -> None:
    entity(client, kind)
    before = everything(sql)
    text = kind.text.encode()
    for raw in (
        b"{",
        b'{"%s": "\xff"}' % text,
        b'{"%s": "\\ud800"}' % text,
        b'{"%s": NaN}' % text,
        b"\x00",
        b'{"attributes": {"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
    ):
        for method, path in (("POST", kind.list), ("PUT", kind.path), ("PATCH", kind.path)):
            answer = client.request(method, path, raw)
            assert assert_problem(answer, 400, "invalid")["error"] == "Invalid request body", raw[:40]
    for raw, field in (
        (b'{"%s": "a\\u0000b"}' % text, kind.text),
        (b'{"attributes": {"k": "\\u0000"}}', "attributes.k"),
        (b'{"attributes": {"k": 1%s}}' % (b"0" * 309), "attributes.k"),
        (b'{"attributes": {"k": 1e999}}', "attributes.k"),
        (b'{"attributes": ' + b'{"a":' * 101 + b"[1]" + b"}" * 101 + b"}", "attributes"),
        (b'{"attributes": ' + b'{"a":' * 800 + b"1" + b"}" * 800 + b"}", "attributes"),
        (b'{"%s": "a", "%s": "b"}' % (text, text), kind.text),
        (b"[]", "body"),
        (b"null", "body"),
        (b'"x"', "body"),
    ):
        for method, path in (("POST", kind.list), ("PUT", kind.path), ("PATCH", kind.path)):
            assert fields(client.request(method, path, raw)) == [field], (method, raw[:40])
    for method, path in (("POST", kind.list), ("PUT", kind.path), ("PATCH", kind.path)):
        assert client.request(method, path, b'{"x": "' + b"x" * 2**20 + b'"}').status == 413
    assert everything(sql) == before


NUMBERS = b'{"big": 9223372036854775807, "small": -1e-300, "huge": 1.7e308, "zero": -0.0, "third": 0.1, "n": 1e22}'


def test_json_of_the_caller_comes_back_as_it_was(client: AppClient) -> None:
    team(client)
    given = {"context": {"a": {"deep": [1, {"b": None}], "null": None, "": "", "ü\u2028": "🧵", "q": '"\\\n'}}}
    numbers = json.loads(NUMBERS)
    for answer in (
        make(client, BEADS, id="x", title="t", project_id=PROJECT, **given),
        client.put(f"{BEADS}/x", given).json,
    ):
        assert answer["context"] == given["context"]
    assert get(client, "x")["context"] == given["context"]
    found = client.put(f"{BEADS}/x", {"context": numbers}).json["context"]
    assert {name: float(value) for name, value in found.items()} == {name: float(v) for name, v in numbers.items()}
    assert found["big"] == numbers["big"]
    deep: dict[str, Any] = {}
    for _ in range(98):
        deep = {"a": deep}
    for method in ("PUT", "PATCH"):
        assert client.request(method, f"{BEADS}/x", {"context": deep}).status == 200
    assert client.get(f"{BEADS}/x").status == client.get(BEADS).status == 200


# What a write changes, and what it leaves


@pytest.mark.parametrize(
    ("kind", "field"),
    [(KINDS[0], "metrics"), (KINDS[1], "context"), (KINDS[2], "persona"), (KINDS[3], "context")],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_a_patch_merges_objects_and_a_put_replaces_them(client: AppClient, kind: Kind, field: str) -> None:
    entity(client, kind)
    client.put(kind.path, {field: {"a": 1, "b": {"c": 2, "d": [3], "e": {"f": 4}}}})
    found = client.patch(kind.path, {field: {"b": {"c": None, "d": [5, None], "e": {"g": 6}}, "h": {"i": None}}}).json
    assert found[field] == {"a": 1, "b": {"d": [5, None], "e": {"f": 4, "g": 6}}, "h": {}}
    found = client.patch(kind.path, {field: {"b": 7, "a": {"x": 1}, "nothing": None}}).json
    assert found[field] == {"a": {"x": 1}, "b": 7, "h": {}}
    assert client.patch(kind.path, {field: {}}).json[field] == found[field]
    assert client.put(kind.path, {field: {"z": None}}).json[field] == {"z": None}
    assert client.put(kind.path, {kind.text: "other"}).json[field] == {"z": None}
    assert not client.put(kind.path, {field: {}}).json.get(field)


@each_kind
def test_a_write_leaves_what_it_does_not_name(client: AppClient, kind: Kind) -> None:
    before = entity(client, kind)
    found = client.put(kind.path, {kind.text: "new", "tags": ["a"]} if "tags" in before else {kind.text: "new"}).json
    changed = {name for name in {*before, *found} if before.get(name) != found.get(name)}
    assert changed - {"tags"} == {kind.text, "version", "updated_at"}
    assert instant(found["updated_at"]) > instant(before["updated_at"])


def test_null_clears_what_may_be_absent(client: AppClient, sql: Sql) -> None:
    team(client, "a")
    make(client, PROVIDERS, id="v", name="v", gpu_constraints={"a": 1}, last_heartbeat_at="2026-01-01T00:00:00Z")
    make(
        client, PROJECTS, id="q", name="q", git_repo="r", branch="b", parent_id=PROJECT, due_date="2026-01-01T00:00:00Z"
    )
    client.patch(f"{AGENTS}/a", {"provider_id": "v", "persona": {"a": 1}})
    bead(client, "y")
    bead(client, "x", assigned_to="a", parent="y", due_date="2026-01-01T00:00:00Z", estimated_time=5, milestone_id="m")
    for path, names in (
        (f"{PROVIDERS}/v", ("gpu_constraints", "last_heartbeat_at")),
        (f"{PROJECTS}/q", ("parent_id", "due_date")),
        (f"{AGENTS}/a", ("provider_id", "persona", "project_id")),
        (f"{BEADS}/x", ("assigned_to", "parent", "due_date", "estimated_time", "milestone_id")),
    ):
        assert all(client.get(path).json[name] is not None for name in names)
        found = client.patch(path, dict.fromkeys(names)).json
        assert [found.get(name) for name in names] == [None] * len(names)
    bead(client, "z", assigned_to="", parent="")
    assert not {"assigned_to", "parent"} & {*get(client, "z")}
    assert_counted(sql)


@each_kind
def test_keys_that_are_read_only_or_unknown(client: AppClient, kind: Kind) -> None:
    before = entity(client, kind)
    read_only = {"version": 99, "created_at": "yesterday", "updated_at": None, "id": "x"}
    originals = {"bead": ("PATCH",)}.get(kind.name, ("PUT",))
    for method in ("PUT", "PATCH"):
        found = client.request(method, kind.path, {**read_only, kind.text: method}).json
        assert (found["id"], found["created_at"]) == ("x", before["created_at"])
        answer = client.request(method, kind.path, {kind.text: "unknown", "tilte": 1})
        if method in originals:
            assert answer.json[kind.text] == "unknown"
        else:
            assert fields(answer) == ["tilte"]
            assert kind.text in answer.json["errors"][0]["allowed"]
    assert client.post(kind.list, {**kind.new, "id": "y", "tilte": 1, "version": 7}).json["version"] == 1


@each_kind
def test_an_id_that_is_taken(client: AppClient, kind: Kind) -> None:
    entity(client, kind)
    answer = client.post(kind.list, {**kind.new, kind.text: "second"})
    if kind.name == "provider":
        assert (answer.status, answer.json["version"], answer.json[kind.text]) == (201, 2, "second")
    else:
        assert_problem(answer, 409, "taken", id="x")
        assert client.get(kind.path).json["version"] == 1


def test_an_agent_that_is_moved_meanwhile_is_not_taken_out_of_its_new_project(
    client: AppClient, sql: Sql, session: Callable[[], Any]
) -> None:
    team(client, "a")
    make(client, PROJECTS, id="q", name="q", git_repo="r", branch="b")
    with session() as other, other.cursor() as cursor, ThreadPoolExecutor(1) as thread:
        cursor.execute("UPDATE agents SET project_id = 'q' WHERE id = 'a'")
        late = thread.submit(client.post, f"{PROJECTS}/p/agents", {"agent_id": "a", "action": "unassign"})
        wait_until(lambda: sql("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        other.commit()
        assert (late.result().status, late.result().json["agents"]) == (200, [])
    assert client.get(f"{AGENTS}/a").json["project_id"] == "q"


# By hand


@each_kind
def test_what_is_changed_by_hand_is_a_version_and_an_event_too(client: AppClient, sql: Sql, kind: Kind) -> None:
    entity(client, kind)
    sql(f"UPDATE {kind.name}s SET {kind.text} = 'by hand' WHERE id = 'x'")
    sql(f"UPDATE {kind.name}s SET {kind.text} = 'by hand' WHERE id = 'x'")
    assert client.get(kind.path).json["version"] == 3
    assert client.put(kind.path, {kind.text: "stale"}, headers={"If-Match": '"1"'}).json["changed"] == [kind.text]
    event = "SELECT version, type, actor, changes FROM events WHERE entity_type = %s AND entity_id = 'x' ORDER BY place"
    (user,) = sql("SELECT 'sql:' || session_user")[0]
    assert sql(event, kind.name)[1] == (2, f"{kind.name}.updated", user, {kind.text: "by hand"})
    sql(f"DELETE FROM {kind.name}s WHERE id = 'x'")
    assert sql(event, kind.name)[-1] == (4, f"{kind.name}.deleted", user, {})
    new = {"name": "n", **kind.new} if kind.name == "agent" else kind.new
    sql(f"INSERT INTO {kind.name}s ({', '.join(new)}) VALUES ({', '.join(['%s'] * len(new))})", *new.values())
    assert client.get(kind.path).json["version"] == 1
    assert_counted(sql)


def test_a_value_that_no_list_could_answer_is_refused_by_hand_too(client: AppClient, sql: Sql) -> None:
    for kind in KINDS:
        entity(client, kind)
    for change in (
        "beads SET due_date = 'infinity'",
        "beads SET due_date = '10000-01-01'",
        "beads SET due_date = '0044-03-15 BC'",
        "beads SET context = '[]'",
        "beads SET attributes = 'null'",
        "beads SET tags = '{NULL}'",
        "beads SET blocked_by = '{NULL}'",
        "beads SET blocked_by = '{nobody}'",
        "beads SET parent = 'nobody'",
        "beads SET assigned_to = 'nobody'",
        "beads SET status = 'done'",
        "beads SET priority = 5",
        "projects SET due_date = '-infinity'",
        "projects SET context = '1'",
        "providers SET cost_per_mtoken = 'NaN'",
        "providers SET model_score = '-Infinity'",
        "providers SET metrics = '[]'",
        "providers SET last_heartbeat_at = 'infinity'",
        "agents SET persona = '[]'",
        "agents SET capabilities = ARRAY[NULL]",
    ):
        with pytest.raises(psycopg2.Error):
            sql(f"UPDATE {change}")
    for kind in KINDS:
        assert client.get(kind.list).status == 200
    assert_counted(sql)


# Times


@pytest.mark.parametrize("zone", ["Asia/Kolkata", "America/St_Johns"])
def test_times_are_utc_whatever_zone_the_server_is_in(
    dsn: str, sql: Sql, zone: str, request: pytest.FixtureRequest
) -> None:
    sql(f"ALTER DATABASE {sql('SELECT current_database()')[0][0]} SET timezone = '{zone}'")
    client = request.getfixturevalue("client")
    team(client, "a")
    for due in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "2026-06-01T12:00:00Z"):
        made = make(client, BEADS, title="t", project_id=PROJECT, due_date=due)
        assert made["due_date"] == due
        for found in (made, client.patch(f"{BEADS}/{made['id']}", {"due_date": due}).json, get(client, made["id"])):
            assert found["due_date"] == due
            assert all(instant(found[name]) for name in ("created_at", "updated_at"))
        answer = client.post(f"{BEADS}/{made['id']}/claim", {"agent_id": "a"}).json
        assert instant(answer["lease_expires_at"]) == instant(answer["bead"]["lease_expires_at"])
        changes = client.get("/api/v1/events?limit=1").json["events"][0]
        assert instant(changes["timestamp"])
    assert {answer["due_date"] for answer in client.get(BEADS).json} > {"0001-01-01T00:00:00Z"}
    sql("UPDATE beads SET title = 'by hand', due_date = '2027-01-01 00:00+03'")
    changes = [
        event["changes"] for event in client.get("/api/v1/events").json["events"] if event["type"].startswith("bead")
    ]
    times = [text for each in changes for name, text in each.items() if name in ("due_date", "created_at")]
    assert times
    assert all(instant(text) for text in times)


# Lists


def ids(answer: Answer) -> list[str]:
    assert answer.status == 200, answer
    return [each["id"] for each in answer.json]


def pages(client: AppClient, path: str) -> list[list[str]]:
    found = []
    while path:
        answer = client.get(path)
        found.append(ids(answer))
        link = answer.headers.get("Link", "")
        assert not link or link.endswith('>; rel="next"')
        path = link[1:].partition(">")[0]
    return found


@pytest.fixture
def many(client: AppClient, sql: Sql) -> AppClient:
    """A thousand beads of two projects, two agents, three types and all statuses, with ids of every kind."""
    team(client, "a", "b,c")
    make(client, PROJECTS, id="q", name="q", git_repo="r", branch="b")
    sql(
        """
        INSERT INTO beads (id, title, project_id, tags, status, type, assigned_to)
        SELECT (ARRAY['B', 'b', 'ü '])[1 + n % 3] || n, n, CASE WHEN n % 5 = 0 THEN 'q' ELSE 'p' END,
               CASE WHEN n % 11 = 0 THEN '{red, x y}' WHEN n % 13 = 0 THEN '{blue}' ELSE '{}' END::text[],
               (ARRAY['open', 'in_progress', 'blocked', 'closed'])[1 + n % 4],
               (ARRAY['task', 'bug', 'epic'])[1 + n % 3],
               CASE WHEN n % 7 = 0 THEN 'a' WHEN n % 7 = 1 THEN 'b,c' END
          FROM generate_series(1, 1000) AS n
        """
    )
    return client


FILTERS = [
    ("", "true"),
    ("project_id=q", "project_id = 'q'"),
    ("status=blocked", "status = 'blocked'"),
    ("status=closed", "status = 'closed'"),
    ("status=open,in_progress", "status IN ('open', 'in_progress')"),
    ("status=open,open", "status = 'open'"),
    ("type=bug", "type = 'bug'"),
    ("type=bug,epic&project_id=q", "type <> 'task' AND project_id = 'q'"),
    ("assigned_to=a", "assigned_to = 'a'"),
    ("assigned_to=a&status=closed", "assigned_to = 'a' AND status = 'closed'"),
    ("assigned_to=a&status=open,closed&project_id=p,q", "assigned_to = 'a' AND status IN ('open', 'closed')"),
    ("project_id=p,q&status=blocked&type=epic", "status = 'blocked' AND type = 'epic'"),
    ("project_id=nobody", "false"),
    ("status=", "true"),
    ("tags=red", "'red' = ANY (tags)"),
    ("tags=red,blue,red", "tags <> '{}'"),
    ("tags=x%20y,none&project_id=p,q&status=open", "'x y' = ANY (tags) AND status = 'open'"),
    ("tags=re", "false"),
    ("tags=&type=bug", "type = 'bug'"),
]


@pytest.mark.parametrize(("query", "where"), FILTERS)
def test_pages_hold_everything_once_in_one_order(many: AppClient, sql: Sql, query: str, where: str) -> None:
    expected = [key for (key,) in sql(f"SELECT id FROM beads WHERE {where} ORDER BY id")]
    assert ids(many.get(f"{BEADS}?{query}")) == expected
    found = pages(many, f"{BEADS}?limit=64&{query}")
    assert [key for page in found for key in page] == expected
    assert {len(page) for page in found[:-1]} <= {64}


def test_a_bad_query_is_named(client: AppClient) -> None:
    for query, field in (
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("limit=x", "limit"),
        ("after=x", "after"),
        ("after=MTIz", "after"),
        ("status=%00", "status"),
        ("type=" + "x," * 101, "type"),
        ("tags=" + "x," * 101, "tags"),
        ("tags=%00", "tags"),
        ("project_id=" + "x" * 10_001, "project_id"),
    ):
        assert fields(client.get(f"{BEADS}?{query}")) == [field], query


def test_a_filter_by_what_no_entity_can_have_is_told_what_there_is(client: AppClient) -> None:
    for path, allowed in (
        (f"{BEADS}?status=open,nonsense", ["open", "in_progress", "blocked", "deferred", "closed"]),
        (f"{AGENTS}?status=open", ["paused", "idle", "working", "deciding", "blocked", "dead"]),
        (f"{PROJECTS}?status=,open", ["open", "closed", "reopened"]),
        (f"{PROVIDERS}?status=Active", ["pending", "active", "error"]),
    ):
        (fault,) = assert_problem(client.get(path), 400, "invalid")["errors"]
        assert (fault["field"], fault["allowed"]) == ("status", sorted(allowed))


def test_the_other_kinds_are_listed_by_their_filters(client: AppClient) -> None:
    team(client, "a", "b")
    make(client, PROJECTS, id="q", name="q", git_repo="r", branch="b", parent_id="p", status="closed")
    make(client, PROVIDERS, id="v", name="v", type="t", owner_id="o", status="active")
    make(client, PROVIDERS, id="w", name="w")
    client.patch(f"{AGENTS}/b", {"project_id": "q", "status": "paused", "provider_id": "v"})
    make(client, AGENTS, id="c", persona_name="backend", project_id="q", capabilities=["go", "sql"])
    make(client, AGENTS, id="d", persona_name="org/team/backend", project_id="q", capabilities=["sql", "c++"])
    for path, expected in (
        (f"{AGENTS}?project_id=q", ["b", "c", "d"]),
        (f"{AGENTS}?status=idle", ["a", "c", "d"]),
        (f"{AGENTS}?status=idle,paused", ["a", "b", "c", "d"]),
        (f"{AGENTS}?persona_type=backend", ["c", "d"]),
        (f"{AGENTS}?persona_type=default/backend", ["c"]),
        (f"{AGENTS}?persona_type=team/backend", []),
        (f"{AGENTS}?persona_type=back,org/team/backend,worker", ["a", "b", "d"]),
        (f"{AGENTS}?capability=sql", ["c", "d"]),
        (f"{AGENTS}?capability=go,c%2B%2B", ["c", "d"]),
        (f"{AGENTS}?capability=go&status=idle&persona_type=backend", ["c"]),
        (f"{AGENTS}?capability=go&status=paused", []),
        (f"{AGENTS}?provider_id=v", ["b"]),
        (f"{PROJECTS}?status=open", ["p"]),
        (f"{PROJECTS}?parent_id=p", ["q"]),
        (f"{PROVIDERS}?type=t", ["v"]),
        (f"{PROVIDERS}?owner_id=o&status=active,error", ["v"]),
        (f"{PROVIDERS}?status=pending", ["w"]),
        (f"{PROVIDERS}?limit=1", ["v"]),
    ):
        assert ids(client.get(path)) == expected, path


def test_registering_a_provider_again_with_nothing_but_its_id_changes_nothing(client: AppClient) -> None:
    first = client.post("/api/v1/providers", {"id": "gpt"})
    again = client.post("/api/v1/providers", {"id": "gpt"})
    assert (first.status, again.status) == (201, 201)
    assert again.json == first.json


def test_a_page_costs_the_same_wherever_it_is_and_whatever_it_is_filtered_by(client: AppClient, sql: Sql) -> None:
    """In blocks that PostgreSQL looks at. What is asked for stands at the end, or not at all."""
    team(client, "a", "b")
    make(client, PROJECTS, id="q", name="q", git_repo="r", branch="b")
    sql("ALTER TABLE beads DISABLE TRIGGER USER")
    sql(
        """
        INSERT INTO beads (id, title, project_id, status, type, assigned_to)
        SELECT 'x' || to_char(n, 'FM00000'), n, CASE WHEN n > 25000 THEN 'q' ELSE 'p' END,
               CASE WHEN n > 25000 THEN 'closed' WHEN n % 3 = 0 THEN 'in_progress' ELSE 'open' END,
               CASE WHEN n > 25000 THEN 'bug' ELSE 'task' END, CASE WHEN n > 25000 THEN 'a' END
          FROM generate_series(1, 50000) AS n
        """
    )
    sql("ALTER TABLE beads ENABLE TRIGGER USER")
    sql("VACUUM ANALYZE beads")
    asked: list[tuple[str, dict[str, Any]]] = []

    class Spy:
        def execute(self, text: str, params: dict[str, Any], **options: Any) -> list[db.Row]:
            asked.append((text.partition(";")[0], params))
            return []

    for filters in (
        {},
        {"project_id": ["q"]},
        {"project_id": ["p", "q"]},
        {"status": ["closed"]},
        {"status": ["blocked"]},
        {"status": ["closed", "blocked"]},
        {"type": ["bug"]},
        {"type": ["epic", "bug"]},
        {"assigned_to": ["a"]},
        {"assigned_to": ["b"]},
        {"assigned_to": ["a"], "status": ["closed", "open"]},
        {"project_id": ["p"], "status": ["blocked"]},
        {"project_id": ["q"], "type": ["bug"]},
    ):
        for after in (None, "x10000", "x40000", "x49990"):
            entities.some(Spy(), Bead, filters=filters, after=after, limit=10)  # type: ignore[arg-type]
            with db.connection() as conn:
                for _ in range(2):  # the first time in a session also reads the catalog
                    (row,) = conn.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {asked[-1][0]}", asked[-1][1])
            plan = row["QUERY PLAN"][0]["Plan"]
            assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 300, (filters, after, plan)


# What a request costs


def test_a_request_is_one_statement(client: AppClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        entity(client, kind)
    make(client, AGENTS, id="a", persona_name="w", project_id=PROJECT)
    statements: list[str] = []
    execute = db.Connection.execute
    monkeypatch.setattr(
        db.Connection, "execute", lambda *args, **kw: statements.append(args[1]) or execute(*args, **kw)
    )
    ids = {"X-Request-ID": "r", "Loom-Proxy-Request-ID": "n", "Loom-Actor": "a"}
    for kind in KINDS:
        for method, path, body in (
            ("GET", kind.path, None),
            ("GET", kind.list, None),
            ("POST", kind.list, {**kind.new, "id": "y"}),
            ("PUT", f"{kind.list}/y", {kind.text: "a"}),
            ("PATCH", f"{kind.list}/y", {kind.text: "b"}),
            ("PATCH", f"{kind.list}/y", {kind.text: "b", **({"blocks": ["x"]} if kind.name == "bead" else {})}),
            ("PATCH", f"{kind.list}/y", {kind.text: "b", **({"status": "closed"} if kind.name == "bead" else {})}),
            ("DELETE", f"{kind.list}/y", None),
        ):
            statements.clear()
            condition = {"If-None-Match": '"7"'} if method == "POST" else {"If-Match": "*"}
            ids["Loom-Proxy-Request-ID"] += "n"
            assert client.request(method, path, body, {**ids, **condition}).status < 300, (method, path)
            assert len(statements) == 1, (method, path, statements)
            assert "BEGIN" not in statements[0]
