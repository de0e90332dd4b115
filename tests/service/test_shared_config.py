"""Shared settings are visible to all instances and take effect; a bad value is refused by name and breaks nothing."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import AppClient
from harness.client import Answer
from harness.locks import Sql, acquire, assert_problem
from harness.work import ask, bead, claim, fail, get, team

from loom import db, upkeep
from loom.config import SHAREABLE, AgentsConfig, Config, DatabaseConfig, check
from loom.http import yaml
from loom.instances import Instance
from loom.state.config import Shared

CONFIG = "/api/v1/config"
MIB = 1024 * 1024
ORIGINAL = ("security", "web_ui", "temporal", "projects", "providers", "agent_assignments", "model_catalog")


def put(client: AppClient, key: str, value: Any, **headers: str) -> Answer:
    return client.put(f"{CONFIG}/{key}", {"value": value}, headers=headers)


def share(client: AppClient, key: str, value: Any) -> dict[str, Any]:
    answer = put(client, key, value)
    assert answer.status == 200, answer
    return answer.json


def shared(client: AppClient) -> dict[str, Any]:
    answer = client.get(CONFIG)
    assert answer.status == 200, answer
    return answer.json["shared"]


def import_yaml(client: AppClient, text: str | bytes, **headers: str) -> Answer:
    raw = text.encode() if isinstance(text, str) else text
    return client.post(f"{CONFIG}/import.yaml", raw, headers=headers)


def assert_invalid(answer: Answer, field: str) -> dict[str, Any]:
    (fault,) = assert_problem(answer, 400, "invalid")["errors"]
    assert fault["field"] == field, fault
    return fault


@pytest.fixture
def level() -> Iterator[None]:
    """Restore the process's log level afterwards."""
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


# Free keys


@pytest.mark.parametrize(
    "value",
    [0, -1, 2**63 - 1, 1.5, True, None, "", "text", "ünï \U0001f600", [], {}, [1, [2, {"a": None}]], {"a": {"b": [0]}}],
    ids=repr,
)
def test_a_key_holds_any_json(client: AppClient, value: Any) -> None:
    made = share(client, "team.policy", value)
    assert set(made) == {"key", "value", "updated_by", "version", "created_at", "updated_at"}
    assert (made["key"], made["value"], made["version"]) == ("team.policy", value, 1)
    assert type(made["value"]) is type(value)
    assert client.get(f"{CONFIG}/team.policy").json == made
    assert shared(client) == {"team.policy": value}
    assert share(client, "team.policy", [value])["version"] == 2
    assert client.delete(f"{CONFIG}/team.policy").status == 204
    assert_problem(client.get(f"{CONFIG}/team.policy"), 404, "not-found")
    assert_problem(client.delete(f"{CONFIG}/team.policy"), 404, "not-found")


def test_updated_by_is_the_last_writer(client: AppClient, sql: Sql) -> None:
    assert put(client, "k", 1, **{"Loom-Actor": "ann"}).json["updated_by"] == "ann"
    assert import_yaml(client, "k: 2", **{"Loom-Actor": "bob"}).status == 200
    assert client.get(f"{CONFIG}/k").json["updated_by"] == "bob"
    sql("UPDATE config SET value = '3'")
    made = client.get(f"{CONFIG}/k").json
    assert (made["value"], made["version"], made["updated_by"]) == (3, 3, sql("SELECT 'sql:' || session_user")[0][0])


def test_the_history_of_a_key_has_its_former_values(client: AppClient) -> None:
    for value, actor in (("one", "ann"), ("two", "bob"), (None, "cy")):
        put(client, "k", value, **{"Loom-Actor": actor})
    client.delete(f"{CONFIG}/k")
    past = client.get(f"{CONFIG}/k/history").json
    assert [event["type"] for event in past] == ["config.deleted", *["config.updated"] * 3]
    assert [(e["version"], e["actor"], e["changes"]["value"]) for e in past[1:]] == [
        (3, "cy", None),
        (2, "bob", "two"),
        (1, "ann", "one"),
    ]


def test_a_stale_write_is_refused(client: AppClient) -> None:
    put(client, "k", 1)
    put(client, "k", 2, **{"Loom-Actor": "ann"})
    for answer in (put(client, "k", 3, **{"If-Match": '"1"'}), put(client, "k", 3, **{"If-Match": '"7"'})):
        problem = assert_problem(answer, 412, "stale", current=client.get(f"{CONFIG}/k").json)
    answer = client.delete(f"{CONFIG}/k", headers={"If-Match": '"1"'})
    problem = assert_problem(answer, 412, "stale")
    assert problem["changed_by"] == {"value": "ann", "updated_by": "ann"}
    made = put(client, "k", 3, **{"If-Match": '"2"'})
    assert (made.status, made.headers["ETag"]) == (200, '"3"')
    assert client.get(f"{CONFIG}/k", headers={"If-None-Match": '"3"'}).status == 304
    assert_problem(put(client, "new", 1, **{"If-Match": '"1"'}), 412, "stale", current=None)


def test_of_two_writers_with_the_same_version_one_wins(client: AppClient, long: bool) -> None:
    version = share(client, "k", 0)["version"]
    with ThreadPoolExecutor(2) as threads:
        for n in range(1000 if long else 200):
            seen = {"If-Match": f'"{version}"'}
            answers = list(threads.map(lambda i, seen=seen: put(client, "k", i, **seen), (2 * n, 2 * n + 1)))
            assert sorted(answer.status for answer in answers) == [200, 412]
            version += 1


def test_a_write_that_nginx_repeats_is_made_once(client: AppClient) -> None:
    put(client, "k", {"a": 0})
    seen = {"Loom-Proxy-Request-ID": "n1", "If-Match": '"1"'}
    first = put(client, "k", {"a": None}, **seen)
    assert first.json["version"] == 2
    assert put(client, "k", {"a": None}, **seen).json == first.json
    for _ in range(2):
        assert client.delete(f"{CONFIG}/k", headers={"Loom-Proxy-Request-ID": "n2"}).status == 204
    for _ in range(2):
        answer = import_yaml(client, "n: 1", **{"Idempotency-Key": "k1", "Loom-Actor": "ann"})
    assert answer.headers["Idempotency-Replayed"] == "true"
    assert client.get(f"{CONFIG}/n").json["version"] == 1


def test_a_client_that_reuses_one_request_id_loses_no_write(client: AppClient) -> None:
    mine = {"X-Request-ID": "my-whole-work"}
    for _ in range(2):
        put(client, "k", 1, **mine)
        put(client, "k", 2)
        assert put(client, "k", 1, **mine).json["version"] == 3
        assert client.delete(f"{CONFIG}/k", headers=mine).status == 204
        assert client.delete(f"{CONFIG}/k", headers=mine).status == 404


def test_a_write_to_a_locked_key_needs_the_token_of_the_lock(client: AppClient) -> None:
    token = str(acquire(client, "config:k")["fencing_token"])
    assert_problem(put(client, "k", 1), 409, "lock-held")
    assert put(client, "k", 1, **{"Loom-Lock-Token": token}).status == 200


KEYS = ["a" * 201, "a\x01b", "%0A", "%00", "%FF", "..", "database", "database.dsn", "server.http_port", "sources"]
KEYS += ["agents.max_concurent", "agents.", "logging.syslog", "logging.syslog.enabled", "export.yaml", "import.yaml"]
KEYS += [*ORIGINAL, "security.key", "shared"]


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("sources", "a\x01b")])
def test_a_reserved_or_invalid_key_is_refused(client: AppClient, sql: Sql, key: str) -> None:
    assert put(client, key, 1).status == (405 if key.endswith("port.yaml") else 400)  # those are paths of their own
    assert sql("SELECT * FROM config") == []


def test_the_refusal_of_a_misspelt_setting_names_the_right_one(client: AppClient) -> None:
    fault = assert_invalid(put(client, "agents.max_concurent", 3), "agents.max_concurent")
    assert "agents.max_concurrent" in fault["problem"]
    assert fault["allowed"] == sorted(SHAREABLE)
    assert_invalid(put(client, "database.dsn", "host=x password=hidden"), "database.dsn")


BODIES = [
    (b"", "value"),
    (b"{}", "value"),
    (b'{"value": 1, "other": 3}', "other"),
    (b'{"version": 3}', "value"),
    (b'{"value": 1, "value": 2}', "value"),
    (b'{"value": "\\u0000"}', "value"),
    (b'{"value": 18%s}' % (b"0" * 307), "value"),
    (b'{"value": ' + b"[" * 101 + b"]" * 101 + b"}", "value"),
    (b'{"value": "' + b"x" * 65535 + b'"}', "k"),
    (b'{"value": [' + b",".join([b"1e300"] * 220) + b"]}", "k"),  # 66,002 digits
    (b"[]", "body"),
]


@pytest.mark.parametrize(("body", "field"), BODIES, ids=range(len(BODIES)))
def test_an_invalid_body_is_refused_and_stores_nothing(client: AppClient, sql: Sql, body: bytes, field: str) -> None:
    assert_invalid(client.put(f"{CONFIG}/k", body), field)
    assert sql("SELECT * FROM config") == []


def test_values_are_limited_to_64_kib_each_and_1_mib_and_1000_keys_in_all(client: AppClient, sql: Sql) -> None:
    for n in range(15):
        share(client, f"k{n}", "x" * 65534)
    assert_invalid(put(client, "last", ["x" * 60000] * 2), "last")
    share(client, "k15", "x" * 65500)
    assert_invalid(put(client, "more", "x" * 100), "value")
    assert len(shared(client)) == 16
    sql("DELETE FROM config")
    lines = [f"k{n}: {n}" for n in range(1001)]
    assert_invalid(import_yaml(client, "\n".join(lines)), "value")
    assert shared(client) == {}
    assert import_yaml(client, "\n".join(lines[:1000])).status == 200
    assert_invalid(put(client, "more", 1), "value")
    assert put(client, "k7", 1).status == 200


@pytest.mark.parametrize("size", ["keys", "bytes"])
def test_the_limits_of_all_shared_values_hold_when_many_write_at_once(client: AppClient, sql: Sql, size: str) -> None:
    if size == "keys":
        sql("INSERT INTO config (key, value) SELECT 'k' || n, '1' FROM generate_series(1, 997) AS n")
    else:
        values = "SELECT 'k' || n, to_jsonb(repeat('x', 64000)) FROM generate_series(1, 15) AS n"
        sql(f"INSERT INTO config (key, value) {values}")
    begin = threading.Barrier(8)

    def add(n: int) -> int:
        begin.wait()
        return put(client, f"new{n}", "x" * 28_000).status

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(add, range(8))) == [200] * 3 + [400] * 5
    assert put(client, "k1", 1).status == 200, "nothing is stuck"


# Loom's own settings

BAD = [
    *(("agents.max_concurrent", value) for value in (0, 1001, -1, 2.0, "20", True, None, [], {})),
    *(("agents.dead_after", value) for value in (9, 86401, "120")),
    *(("agents.file_lock_timeout", value) for value in (0, 86401, 600_000_000_000)),
    *(("beads.max_failures", value) for value in (0, 1001)),
    *(("beads.max_attempts", value) for value in (0, 1001)),
    *(("locks.history_days", value) for value in (0, 3651)),
    *(("events.history_days", value) for value in (0, 3651)),
    *(("logging.level", value) for value in ("loud", "INFO", 20, None)),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=repr)
def test_a_bad_value_is_refused_in_every_request_that_sets_it(
    client: AppClient, sql: Sql, key: str, value: Any
) -> None:
    section, name = key.split(".")
    for answer in (
        put(client, key, value),
        client.put(CONFIG, {"beads": {"max_failures": 7}, section: {name: value}}),
        import_yaml(client, json.dumps({"a": 1, key: value, "z": 2})),
        import_yaml(client, json.dumps({"a": 1, section: {name: value}, "z": 2})),
    ):
        fault = assert_invalid(answer, key)
        assert "expected" in fault["problem"]
        assert ("allowed" in fault) == (key == "logging.level")
    assert sql("SELECT * FROM config") == sql("SELECT * FROM events") == []


def test_a_shared_setting_overrides_the_file_and_is_visible_at_once(client: AppClient, instance: Instance) -> None:
    client._app.config["LOOM"] = Config(agents=AgentsConfig(max_concurrent=7, dead_after=50))
    share(client, "agents.max_concurrent", 3)
    assert client.get(CONFIG).json["agents"] == {"max_concurrent": 3, "dead_after": 50, "file_lock_timeout": 600}
    client.delete(f"{CONFIG}/agents.max_concurrent")
    assert client.get(CONFIG).json["agents"]["max_concurrent"] == 7


def test_settings_in_force_are_the_own_ones_overridden_by_the_shared_ones() -> None:
    own, other, known = Config(), Config(agents=AgentsConfig(dead_after=50)), Shared()
    assert known.over(own) == own
    assert known.learn({"agents.max_concurrent": "3"})
    assert known.over(own).agents == AgentsConfig(max_concurrent=3)
    assert known.over(own) is known.over(own)
    assert known.over(other).agents == AgentsConfig(max_concurrent=3, dead_after=50)
    assert not known.learn({"agents.max_concurrent": "3"})
    assert known.learn(None)
    assert known.over(other) == other


def test_limits_of_claims_take_effect_with_the_next_heartbeat(client: AppClient, sql: Sql, instance: Instance) -> None:
    team(client, "a")
    for key in ("x", "y", "z"):
        bead(client, key)
    share(client, "agents.max_concurrent", 1)
    share(client, "beads.max_failures", 1)
    instance.beat()
    token = claim(client, "x")
    assert_problem(ask(client, "y"), 409, "agent-busy")
    assert fail(client, "x", token).json["status"] == "blocked"
    client.delete(f"{CONFIG}/agents.max_concurrent")
    share(client, "beads.max_failures", 2)
    instance.beat()
    token = claim(client, "y")
    claim(client, "z")
    assert fail(client, "y", token).json["status"] == "open"


def test_retention_takes_effect_with_the_next_heartbeat(client: AppClient, sql: Sql, instance: Instance) -> None:
    cleaner = upkeep.Upkeep(Config(), instance)
    team(client, "a")
    sql("UPDATE events SET timestamp = clock_timestamp() - INTERVAL '10 days'")
    cleaner.clean()
    assert sql("SELECT count(*) FROM events") == [(2,)]
    share(client, "events.history_days", 9)
    share(client, "locks.history_days", 9)
    instance.beat()
    cleaner.clean()
    assert sql("SELECT DISTINCT entity_type FROM events") == [("config",)]
    assert cleaner._config.locks.history_days == 9


def test_triggers_use_the_shared_limits(client: AppClient, sql: Sql) -> None:
    team(client, "a")
    bead(client, "x")
    bead(client, "y")
    share(client, "beads.max_attempts", 1)
    claim(client, "x")
    sql("UPDATE agents SET status = 'dead'")
    assert get(client, "x")["status"] == "blocked"
    for bad in ('"x"', "0", "1001", "1.5", "null", "[]", "1e300", '"1"'):
        sql("UPDATE config SET value = %s", bad)
        assert sql("SELECT setting('beads.max_attempts')") == [(20,)], bad
    claim(client, "y")
    sql("DELETE FROM agents")
    assert get(client, "y")["status"] == "open"


@pytest.mark.parametrize(
    "key", ["agents.max_concurrent", "agents.dead_after", "beads.max_failures", "beads.max_attempts"]
)
def test_by_hand_the_database_goes_by_the_defaults_and_ranges_of_the_configuration(sql: Sql, key: str) -> None:
    section, name = key.split(".")
    default = getattr(getattr(Config(), section), name)
    assert sql("SELECT setting(%s)", key) == [(default,)]
    sql("INSERT INTO config (key, value) VALUES (%s, '1')", key)
    for value in (0, 1, 9, 10, 11, 1000, 1001, 86400, 86401, 100000):
        sql("UPDATE config SET value = %s WHERE key = %s", json.dumps(value), key)
        assert sql("SELECT setting(%s)", key) == [(value if valid(key, value) else default,)], value


def valid(key: str, value: int) -> bool:
    try:
        check(key, value)
    except ValueError:
        return False
    return True


@pytest.mark.usefixtures("level")
def test_the_log_level_follows_the_shared_setting_and_returns_when_it_is_deleted(
    client: AppClient, instance: Instance
) -> None:
    logging.getLogger().setLevel("INFO")
    share(client, "logging.level", "debug")
    instance.beat()
    assert logging.getLogger().level == logging.DEBUG
    client.delete(f"{CONFIG}/logging.level")
    instance.beat()
    assert logging.getLogger().level == logging.INFO


@pytest.mark.usefixtures("level")
def test_an_instance_starts_with_the_shared_settings(client: AppClient, database: db.Database) -> None:
    share(client, "logging.level", "error")
    share(client, "agents.max_concurrent", 3)
    me = Instance(database, {})
    me.beat()
    assert me.shared.over(Config()).agents.max_concurrent == 3
    assert logging.getLogger().level == logging.ERROR
    me.leave()


WRITTEN_BY_HAND = ['"x"', "0", "1e300", "null", "[]", '{"a": 1}', json.dumps("x" * 1000), "1" * 300]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("bad", WRITTEN_BY_HAND, ids=range(len(WRITTEN_BY_HAND)))
def test_a_bad_value_written_by_hand_is_ignored_and_logged_once(
    client: AppClient, sql: Sql, instance: Instance, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    sql("INSERT INTO config (key, value) VALUES ('agents.max_concurrent', %s), ('agents.dead_after', '30')", bad)
    for _ in range(3):
        instance.beat()
    ignored = [record.fields for record in caplog.records if record.getMessage() == "setting-ignored"]
    assert [fields["setting"] for fields in ignored] == ["agents.max_concurrent"]
    assert instance.missed == 0
    in_force = instance.shared.over(Config()).agents
    assert (in_force.max_concurrent, in_force.dead_after) == (20, 30)
    answer = client.get(CONFIG)
    assert answer.status == client.get(f"{CONFIG}/agents.max_concurrent").status == 200
    assert b'"max_concurrent":20' in answer.body
    assert client.get(f"{CONFIG}/export.yaml").status == 200
    share(client, "agents.max_concurrent", 4)
    instance.beat()
    assert instance.shared.over(Config()).agents.max_concurrent == 4


def test_a_heartbeat_reads_the_settings_in_its_one_round_trip(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements: list[str] = []
    execute = db.Connection.execute
    monkeypatch.setattr(
        db.Connection, "execute", lambda *args, **kw: statements.append(args[1]) or execute(*args, **kw)
    )
    instance.beat()
    assert len(statements) == 1


# The snapshot


def test_an_old_client_can_read_change_and_write_back_the_snapshot(client: AppClient, sql: Sql) -> None:
    whole = client.get(CONFIG).json
    assert list(whole) == ["database", "server", "agents", "beads", "locks", "events", "logging", "shared"]
    assert client.put(CONFIG, whole).json == whole
    assert client.put(CONFIG, {}).json == whole
    assert sql("SELECT * FROM config") == []
    whole["agents"]["max_concurrent"] = 9
    whole["logging"]["level"] = "debug"
    whole["server"]["http_port"] = 8081  # another instance's
    whole["server"]["tls"] = whole["security"] = {"jwt_secret": "s3cret"}
    whole["temporal"] = None
    whole["shared"]["x"] = 1
    answer = client.put(CONFIG, whole, headers={"Loom-Actor": "ann"})
    assert answer.status == 200
    assert (answer.json["agents"]["max_concurrent"], answer.json["logging"]["level"]) == (9, "debug")
    assert answer.json["server"]["http_port"] == 8080
    assert answer.json["shared"] == {"agents.max_concurrent": 9, "logging.level": "debug"}
    assert sql("SELECT key, version, updated_by FROM config ORDER BY 1") == [
        ("agents.max_concurrent", 1, "ann"),
        ("logging.level", 1, "ann"),
    ]


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("database", "dsn", "host=elsewhere"),
        ("database", "type", "embedded"),
        ("database", "pool_max", 3),
        ("server", "threads", 9),
        ("server", "host", "0.0.0.0"),
        ("logging", "format", "text"),
        ("logging", "output", None),
    ],
)
def test_a_setting_that_cannot_be_shared_is_refused_by_name_and_nothing_is_stored(
    client: AppClient, sql: Sql, section: str, name: str, value: Any
) -> None:
    fault = assert_invalid(
        client.put(CONFIG, {"agents": {"dead_after": 30}, section: {name: value}}), f"{section}.{name}"
    )
    assert fault["allowed"] == sorted(SHAREABLE)
    assert_invalid(
        import_yaml(client, json.dumps({"agents.dead_after": 30, f"{section}.{name}": value})), f"{section}.{name}"
    )
    assert sql("SELECT * FROM config") == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ([], "body"),
        ({"agents": []}, "agents"),
        ({"logging": {"syslog": 1}}, "logging.syslog"),
    ],
)
def test_an_invalid_section_is_refused_by_name(client: AppClient, body: Any, field: str) -> None:
    assert_invalid(client.put(CONFIG, body), field)


def test_no_answer_shows_a_password(client: AppClient) -> None:
    dsn = "postgresql://loom:s3cret@db:5432/loom?sslpassword=s3cret"
    client._app.config["LOOM"] = Config(database=DatabaseConfig(type="postgres", dsn=dsn))
    whole = client.get(CONFIG)
    assert "host=db port=5432" in whole.json["database"]["dsn"]
    answers = [
        whole,
        client.put(CONFIG, whole.json),
        client.put(CONFIG, {"database": {"dsn": dsn + "x"}}),
        put(client, "database.dsn", dsn),
        import_yaml(client, "a: 1"),
        client.get(f"{CONFIG}/export.yaml"),
        client.get(f"{CONFIG}/database.dsn"),
    ]
    assert [answer.status for answer in answers] == [200, 200, 400, 400, 200, 200, 404]
    assert not any(b"s3cret" in answer.body for answer in answers)


# YAML


def test_an_export_can_be_imported_again(client: AppClient, sql: Sql) -> None:
    values = {
        "agents.max_concurrent": 9,
        "date": "2026-01-01",
        "deep": json.loads("[" * 100 + "]" * 100),
        "numbers": [0, -1, 2**63 - 1, 0.1, -5e-324],
        "lines": ["line\nline\n", {"a": "\n"}],
        "text": "line\nline\r\n\ttab \x7f\x85\u2028 ünï \U0001f600 # : - ' \"",
        "yes": ["yes", "null", "~", "1e5", "0o7", "1:30", "<<", "=", " ", "", "- a", "&a", "*a", "!t", "%", "@"],
    }
    for key, value in values.items():
        share(client, key, value)
    export = client.get(f"{CONFIG}/export.yaml")
    assert (export.status, export.headers["Content-Type"]) == (200, "application/x-yaml")
    assert export.body.count(b"\n") == len(values)
    sql("DELETE FROM config")
    assert import_yaml(client, export.body).json["shared"] == shared(client)
    assert [client.get(f"{CONFIG}/{key}").json["value"] for key in values] == list(values.values())
    assert client.get(f"{CONFIG}/export.yaml").body == export.body
    assert import_yaml(client, export.body).status == 200
    assert sql("SELECT DISTINCT version FROM config") == [(1,)], "a value that does not change gets no new version"


def test_a_number_beyond_64_bits_survives_export_and_import(client: AppClient) -> None:
    for value in (1e300, 2**64, -(10**308)):
        share(client, "k", value)
        shared_before = client.get(f"{CONFIG}/k").body
        assert import_yaml(client, client.get(f"{CONFIG}/export.yaml").body).status == 200
        assert client.get(f"{CONFIG}/k").body == shared_before
        assert float(client.get(f"{CONFIG}/k").json["value"]) == float(value)


def test_nothing_is_exported_when_nothing_is_shared(client: AppClient) -> None:
    export = client.get(f"{CONFIG}/export.yaml")
    assert yaml.read(export.body) == {}
    assert import_yaml(client, export.body).json == client.get(CONFIG).json


def test_an_import_accepts_the_configuration_files_of_loom_and_of_the_original(client: AppClient) -> None:
    """Their sections; those that Loom does not have are ignored."""
    text = """
        agents: {max_concurrent: 9, default_persona_path: ./personas, heartbeat_interval: 30000000000}
        server: {http_port: 8081, threads: 32}
        security: {jwt_secret: s3cret}
        projects: []
        team: 2026-01-01
        logging.level: warning
    """
    answer = import_yaml(client, text)
    assert answer.status == 200
    assert answer.json["shared"] == {"agents.max_concurrent": 9, "logging.level": "warning", "team": "2026-01-01"}


def test_an_import_does_not_change_keys_that_it_does_not_name(client: AppClient) -> None:
    share(client, "a", 1)
    assert import_yaml(client, "b: 2").json["shared"] == {"a": 1, "b": 2}


WRONG = [
    ("a: 'x", "body"),
    ("a: [1", "body"),
    ("- 1", "body"),
    ("text", "body"),
    ("a: 1\n---\nb: 1", "body"),
    ("? [a]\n: 1", "body"),
    (b"a: \xff", "body"),
    (b"a: \x00", "body"),
    ("[" * 100_000, "body"),
    ("a: 1\nb: " + "[" * 101 + "]" * 101, ("b" + "[0]" * 100)[:200]),
    ("a: 1\na: 2", "a"),
    ("a: 1\nb: {c: 1, c: 2}", "b.c"),
    ("a: &a [x]\nb: [*a, *a]", "b[0]"),
    ("a: &a [*a]", "a[0]"),
    ("a: 1\nb: !!python/object:os.system {}", "b"),
    ("a: 1\nb: !!binary aGk=", "b"),
    ("a: 1\nb: .nan", "b"),
    ("a: 1\nb: -.inf", "b"),
    ("a: 1\nb: 1" + "0" * 309, "b"),
    ("a: 1\nb: 1" + ":1" * 100_000, "b"),
    ("a: 1\nb: " + "9" * 5000, "b"),
    ('a: 1\nb: "\\0"', "b"),
    ('a: 1\n"b\\0": 1', "b\\u0000"),
    ('a: 1\n"b\\nc": 1', "b\\nc"),
    ("a: 1\nb/c: 1", "b/c"),
    ("a: 1\n'': 1", ""),
    ("a: 1\n" + "b" * 201 + ": 1", "b" * 200),
    ("a: 1\nb: " + "x" * 65535, "b"),
    ("a: 1\nagents: 7", "agents"),
    ("a: 1\nagents.max: 7", "agents.max"),
    ("a: 1\nexport.yaml: 7", "export.yaml"),
]


@pytest.mark.parametrize(("text", "field"), WRONG, ids=range(len(WRONG)))
def test_a_document_with_any_fault_changes_nothing(client: AppClient, sql: Sql, text: str | bytes, field: str) -> None:
    assert_invalid(import_yaml(client, text), field)
    assert sql("SELECT * FROM config") == sql("SELECT * FROM events") == []


def test_an_import_may_have_5_mib_and_any_other_body_1_mib(client: AppClient) -> None:
    assert import_yaml(client, b"a: 1\n" + b"#" * (5 * MIB - 5)).json["shared"] == {"a": 1}
    for answer in (
        import_yaml(client, b"a: 2\n" + b"#" * (5 * MIB - 4)),
        import_yaml(client, b"a: 2\n" + b"#" * (5 * MIB - 4), **{"Idempotency-Key": "k"}),
        client.put(CONFIG, b" " * MIB + b"{}"),
        client.put(f"{CONFIG}/a", b" " * MIB + b'{"value": 2}'),
    ):
        assert_problem(answer, 413, "too-large")
    assert shared(client) == {"a": 1}


def test_the_cost_of_an_import_is_bounded_by_its_length(client: AppClient) -> None:
    started = time.process_time()
    assert (
        "100000"
        in assert_invalid(import_yaml(client, b"a: [" + b"1," * (5 * MIB // 2 - 10) + b"]"), "a[99999]")["problem"]
    )
    assert_invalid(import_yaml(client, b"a: 1" + b":1" * 400_000), "a")  # a number to the base 60 in YAML 1.1
    lines = [b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9) if n else b"lol") for n in range(10)]
    assert_invalid(import_yaml(client, b"\n".join(lines)), "a1[0]")
    assert time.process_time() - started < 20


TEXT = "ab \n\r\t\x01\x7f\x85\u2028\ufeffé\U0001f600\U0010ffff:#-'\"\\{}[],&*!|>%@`01.e+?~=<yn"


def anything(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(7 if depth < 4 else 5)
    if kind == 5:
        return [anything(dice, depth + 1) for _ in range(dice.randrange(4))]
    if kind == 6:
        return {text(dice): anything(dice, depth + 1) for _ in range(dice.randrange(4))}
    return (
        dice.choice([None, True, False]),
        dice.randrange(-(2**63), 2**63),
        dice.choice([dice.random(), 1e300, -1e-300, 1e16, 5e-324, 0.0]),
        text(dice),
        dice.choice(["yes", "no", "null", "~", "2026-01-01", "0x1f", "0o7", "1:30", "1_0", "1e5", ".inf", "<<", "="]),
    )[kind]


def text(dice: random.Random) -> str:
    return "".join(dice.choices(TEXT, k=dice.choice([0, 1, 3, 10, 200])))


def test_values_survive_being_written_and_read_as_yaml(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(1000):
        values = {f"k{n}": anything(dice) for n in range(3)}
        assert json.dumps(yaml.read(yaml.write(values).encode())) == json.dumps(values)
