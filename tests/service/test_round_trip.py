"""PUT accepts what GET answers: a client that reads an entity, changes a field and writes it back is not refused."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import psycopg2
import pytest
from harness import AppClient
from harness.entities import KINDS, PROJECTS, PROVIDERS, entity
from harness.locks import BUILD, Sql, assert_problem
from harness.work import AGENTS, BEADS, PROJECT, bead, claim, complete, fail, get, make, renew, team

CONFIG = "/api/v1/config"
JSON_FIELDS = {
    "provider": ("attributes", "metrics", "gpu_constraints"),
    "project": ("attributes", "context", "git_config_options"),
    "agent": ("attributes", "persona"),
    "bead": ("attributes", "context"),
}
GREATEST = "1.7976931348623157e308"
NUMBERS = (
    *("0", "-0", "-0.0", "0.0", "1.0", "1.50", "0.1", "1e19", "-1e19", "1e22", "1e308", GREATEST, "-" + GREATEST),
    *("1e-320", "5e-324", "2.2250738585072014e-308", "1e-400", "9007199254740993", "9007199254740993.0"),
    *("9223372036854775808", "18446744073709551616", "-9223372036854775809", "1" + "0" * 308, "9" * 308, "1E+2"),
    *("0." + "1" * 400, "1" * 300 + ".5", "123456789012345678901234567890.5", "1" + "0" * 15, "1e15", "1e16", "1e17"),
)
TEXTS = (
    "",
    " ",
    "\u2028\u2029",
    "\U0001f9f5",
    "\U0010ffff",
    "\ufeff",
    "\ufffe",
    "\x01\x1f\x7f\x85",
    '"\\/\n\t',
    "__proto__",
)


def value(dice: random.Random, depth: int = 0) -> str:
    """Return any JSON as text, since its numbers must be sent as they are written."""
    kind = dice.randrange(6 if depth < 4 else 4)
    if kind == 4:
        return "[" + ", ".join(value(dice, depth + 1) for _ in range(dice.randrange(4))) + "]"
    if kind == 5:
        return objects(dice, depth + 1)
    return dice.choice([dice.choice(NUMBERS), number(dice), json.dumps(dice.choice(TEXTS)), "null", "true", "false"])


def number(dice: random.Random) -> str:
    digits = "".join(dice.choices("0123456789", k=dice.choice([1, 5, 17, 25, 300])))
    return dice.choice(["", "-"]) + dice.choice(
        [str(int(digits)), f"{int(digits)}.{digits}", f"{digits[0]}.{digits}e{dice.randrange(-330, 308)}"]
    )


def objects(dice: random.Random, depth: int = 0) -> str:
    names = {dice.choice([*TEXTS, "a", "b" * 300]) for _ in range(dice.randrange(1, 5))}
    return "{" + ", ".join(f"{json.dumps(name)}: {value(dice, depth)}" for name in sorted(names)) + "}"


def doubles(found: Any) -> Any:
    """Parse as a reader whose only numbers are doubles."""
    return json.loads(found if isinstance(found, bytes) else json.dumps(found), parse_int=float)


def kept(answered: bytes) -> dict[str, Any]:
    """Return the fields of an answer that a write without changes keeps, with numbers as they are written."""
    found = json.loads(answered, parse_int=str, parse_float=str)
    return {name: each for name, each in found.items() if name not in ("version", "updated_at", "updated_by")}


def assert_accepted_back(client: AppClient, path: str) -> dict[str, Any]:
    """Assert that PUT accepts what GET answers and changes nothing. Returns the entity."""
    first = client.get(path)
    assert first.status == 200, first
    answer = client.put(path, first.body)
    assert answer.status == 200, (first.body[:500], answer)
    again = client.get(path)
    assert kept(again.body) == kept(answer.body) == kept(first.body)
    return again.json


def test_any_json_in_a_free_field_is_answered_and_accepted_back(client: AppClient, seed: int, long: bool) -> None:
    dice = random.Random(seed)
    for kind in KINDS:
        entity(client, kind)
        for field in JSON_FIELDS[kind.name]:
            numbers = "{" + ", ".join(f'"n{n}": [{text}]' for n, text in enumerate(NUMBERS)) + "}"
            deep = '{"": ' * 100 + "1" + "}" * 100
            for text in (numbers, deep, *(objects(dice) for _ in range(200 if long else 20))):
                answer = client.put(kind.path, f'{{"{field}": {text}}}'.encode())
                assert answer.status == 200, (text, answer)
                assert doubles(answer.body)[field] == doubles(text.encode()), text
                assert_accepted_back(client, kind.path)
    assert client.get("/api/v1/events?after=0&limit=1000").status == 200
    for kind in KINDS:
        assert client.get(kind.list).status == client.get(f"{kind.path}/history").status == 200


def test_any_json_as_a_shared_value_is_answered_and_accepted_back(client: AppClient, seed: int, long: bool) -> None:
    dice = random.Random(seed)
    for text in (*NUMBERS, "[" * 100 + "]" * 100, *(value(dice) for _ in range(200 if long else 40))):
        answer = client.put(f"{CONFIG}/k", f'{{"value": {text}}}'.encode())
        assert answer.status == 200, (text, answer)
        assert doubles(answer.body)["value"] == doubles(text.encode()), text
        before = assert_accepted_back(client, f"{CONFIG}/k")["value"]
        assert client.put(CONFIG, client.get(CONFIG).body).status == 200
        exported = client.get(f"{CONFIG}/export.yaml").body
        assert client.post(f"{CONFIG}/import.yaml", exported).status == 200, text
        assert doubles(client.get(f"{CONFIG}/k").json["value"]) == doubles(before), text
    for field in ("version", "created_at", "updated_at", "updated_by", "key"):
        assert client.put(f"{CONFIG}/k", {"value": 1, field: None}).status == 200


def test_an_integer_keeps_its_digits(client: AppClient) -> None:
    team(client)
    numbers = [2**53 + 1, 2**63, -(2**64) - 1, 10**300 + 1]
    bead(client, "x", context={"n": numbers})
    assert client.put(f"{CONFIG}/k", {"value": numbers}).json["value"] == numbers
    assert client.post(BUILD, {"metadata": {"n": numbers}}).json["metadata"]["n"] == numbers
    assert assert_accepted_back(client, f"{BEADS}/x")["context"]["n"] == numbers
    assert client.get(BUILD).json["metadata"]["n"] == numbers


def test_an_entity_in_any_state_is_accepted_back_and_keeps_its_state(client: AppClient, sql: Sql) -> None:
    team(client, "a", "b")
    make(client, PROVIDERS, id="v", name="v", last_heartbeat_at="2026-01-01T00:00:00Z", model_score=1e300)
    make(client, PROJECTS, id="q", name="q", git_repo="r", branch="b", parent_id=PROJECT, git_strategy="branch-pr")
    client.patch(f"{AGENTS}/b", {"provider_id": "v", "persona": {"a": 1e19}, "capabilities": ["go"]})
    persona = make(client, AGENTS, id="c", persona_name="x" * 992, project_id=PROJECT)["persona_name"]
    assert len(persona) == 1000
    for key in ("epic", "first", "held", "failed", "done", "person"):
        bead(client, key, parent=None if key == "epic" else "epic", due_date="0001-01-01T00:00:00Z", tags=["t"])
    client.patch(f"{BEADS}/held", {"blocks": ["failed"], "related_to": ["done"]})
    client.patch(f"{BEADS}/person", {"status": "in_progress", "assigned_to": "b"})
    complete(client, "done", claim(client, "done"), close_reason="r" * 10_000, context={"n": 1e19})
    fail(client, "first", claim(client, "first"), reason="no", retry_after_seconds=3600)
    client.post(f"{BEADS}/first/redispatch", {"reason": "again"})
    token = claim(client, "held", agent="b")
    client.post(f"{AGENTS}/b/heartbeat", {"claims": {"held": token}})
    client.post(f"{BEADS}/held/comments", {"content": "c"})
    client.post(f"{PROJECTS}/q/comments", {"author_id": "a", "comment": "c"})
    assert client.post(f"{PROJECTS}/q/close", {"author_id": "a"}).status == 200
    sql("UPDATE agents SET status = 'dead' WHERE id = 'a'")
    for path in (
        *(f"{BEADS}/{key}" for key in ("epic", "first", "held", "failed", "done", "person")),
        *(f"{AGENTS}/{key}" for key in "abc"),
        *(f"{PROJECTS}/{key}" for key in (PROJECT, "q")),
        f"{PROVIDERS}/v",
    ):
        assert_accepted_back(client, path)
    assert renew(client, "held", token).status == 200


def test_json_that_was_written_by_hand_is_answered_and_accepted_back(client: AppClient, sql: Sql) -> None:
    """A fraction is answered as a double: one with more digits as the nearest double."""
    for kind in KINDS:
        entity(client, kind)
        for field in JSON_FIELDS[kind.name]:
            numbers = "[123456789012345678901234567890, 1e308, -1.7976931348623157e308, 0.1234567890123456789, 1e-5000]"
            sql(f"UPDATE {kind.name}s SET {field} = %s", f'{{"n": {numbers}, "": {{"\U0001f9f5\u2028": ""}}}}')
            found = assert_accepted_back(client, kind.path)[field]
            assert found["n"][0] == 123456789012345678901234567890
            assert doubles(found["n"]) == doubles(numbers.encode())
    sql("INSERT INTO config (key, value) VALUES ('k', '{\"n\": [1e308, 123456789012345678901234567890]}')")
    assert client.put(f"{CONFIG}/k", client.get(f"{CONFIG}/k").body).status == 200
    assert client.get(f"{CONFIG}/k").json["value"]["n"][1] == 123456789012345678901234567890


@pytest.mark.parametrize(
    "text", ["1e309", "-1e309", "1e5000", "1.5e400", "1" + "0" * 5000 + ".5", "[" * 101 + "]" * 101], ids=range(6)
)
def test_json_that_no_list_could_answer_is_refused_also_in_psql(client: AppClient, sql: Sql, text: str) -> None:
    """It would break every list with the entity, and every reader of the feed."""
    for kind in KINDS:
        entity(client, kind)
        for field in JSON_FIELDS[kind.name]:
            with pytest.raises(psycopg2.errors.CheckViolation):
                sql(f"UPDATE {kind.name}s SET {field} = %s", f'{{"n": {text}}}')
        assert client.get(kind.list).status == 200
    with pytest.raises(psycopg2.errors.CheckViolation):
        sql("INSERT INTO config (key, value) VALUES ('k', %s)", text)
    assert client.get("/api/v1/events?after=0").status == client.get(CONFIG).status == 200


def test_the_cost_of_a_number_is_bounded_by_its_digits(client: AppClient) -> None:
    team(client)
    bead(client, "x")
    started = time.process_time()
    for numbers in (["9" * 2**19], ["9" * 4000] * 240, ["-" + "9" * 310] * 3000, ["1e999999"] * 9):
        body = f'{{"context": {{"n": [{", ".join(numbers)}]}}}}'.encode()
        assert_problem(client.put(f"{BEADS}/x", body), 400, "invalid")
    assert client.put(f"{BEADS}/x", f'{{"context": {{"n": [{", ".join(["9" * 308] * 3000)}]}}}}'.encode()).status == 200
    assert time.process_time() - started < 5
    assert len(get(client, "x")["context"]["n"]) == 3000
