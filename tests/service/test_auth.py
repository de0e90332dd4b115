"""Who may come in: by a key, or from this host, and by no trick; a key that was revoked opens nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from flask import Flask
from harness import AppClient
from harness.client import Answer
from harness.locks import Sql, assert_problem
from harness.processes import wait_until

from loom import db
from loom.config import SecurityConfig
from loom.http import permissions
from loom.instances import Instance
from loom.state import keys

LOCKS, KEYS = "/api/v1/locks", "/api/v1/keys"
ANYONES = ("/health", "/health/live", "/health/ready", "/api/v1/health", "/api/openapi.yaml")
Make = Callable[..., str]


def use(app: Flask, **security: Any) -> None:
    """Restarts the application with these settings."""
    app.config["LOOM"] = replace(app.config["LOOM"], security=SecurityConfig(**security))


@pytest.fixture
def make(database: db.Database) -> Make:
    """Creates a key."""

    def create(role: keys.Role, principal: str = "p", **more: Any) -> str:
        with database.connection() as conn:
            return keys.create(conn, principal, role, by=None, **more).key

    return create


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def assert_refused(answer: Answer) -> None:
    """The same 401 for every reason."""
    assert_problem(answer, 401, "unauthorized")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert answer.json["detail"] == "Send it as X-API-Key, or as Authorization: Bearer."


REMOTE = [
    {"REMOTE_ADDR": "192.0.2.7"},
    {"REMOTE_ADDR": "::ffff:192.0.2.7"},
    {"REMOTE_ADDR": ""},  # a Unix socket
    {"REMOTE_ADDR": "", "HTTP_X_FORWARDED_FOR": "127.0.0.1"},
    {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "127.0.0.1"},  # of which proxy?
    {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_REAL_IP": "192.0.2.7"},
    {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_REAL_IP": "127.0.0.1,192.0.2.7"},
    # The client has sent X-Real-IP itself, through a proxy that only adds X-Forwarded-For.
    {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_REAL_IP": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "127.0.0.1, 192.0.2.7"},
    {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_REAL_IP": "127.0.0.1", "HTTP_FORWARDED": "for=192.0.2.7"},
    {"REMOTE_ADDR": "127.0.0.1", "HTTP_FORWARDED": "for=127.0.0.1"},
    {"REMOTE_ADDR": "192.0.2.7", "HTTP_X_REAL_IP": "127.0.0.1"},
    {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_REAL_IP": ""},
]
HERE = [
    {"REMOTE_ADDR": "127.0.0.1"},
    {"REMOTE_ADDR": "127.8.8.8"},
    {"REMOTE_ADDR": "::1"},
    {"REMOTE_ADDR": "::ffff:127.0.0.1"},
    {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_REAL_IP": "::1", "HTTP_X_FORWARDED_FOR": "192.0.2.7, ::1"},
    {"REMOTE_ADDR": "", "HTTP_X_REAL_IP": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "127.0.0.1"},
]


@pytest.mark.parametrize("environ", REMOTE)
def test_by_default_who_is_not_on_this_host_needs_a_key(app: Flask, make: Make, environ: dict[str, str]) -> None:
    client = AppClient(app, **environ)
    for path in (LOCKS, KEYS, "/metrics", "/api/v1/config", "/api/v1/nothing"):
        assert_refused(client.get(path))
    assert_refused(client.post(f"{LOCKS}/build"))
    for path in ANYONES:
        assert client.get(path).status == 200
    assert client.get(LOCKS, headers=bearer(make("reader"))).status == 200


@pytest.mark.parametrize("environ", HERE)
def test_by_default_who_is_on_this_host_needs_none(app: Flask, make: Make, environ: dict[str, str]) -> None:
    client = AppClient(app, **environ)
    assert client.post(f"{LOCKS}/build").status == 201
    make("admin")
    assert client.get(KEYS).status == 200, "keys or not"
    assert client.get(KEYS, headers=bearer("of-another-service")).status == 200


def test_a_key_counts_also_on_this_host(client: AppClient, make: Make) -> None:
    reader = make("reader")
    assert_problem(client.post(f"{LOCKS}/build", headers=bearer(reader)), 403, "forbidden")
    for wrong in (reader[:-1] + "x", reader[:-1], "loom_"):
        assert_refused(client.get(LOCKS, headers=bearer(wrong)))


def test_on_means_everybody(app: Flask, client: AppClient, make: Make) -> None:
    use(app, auth="on")
    assert_refused(client.get(LOCKS))
    key = make("admin")
    assert client.get(KEYS, headers={"X-API-Key": key}).status == 200
    assert client.get(KEYS, headers={"Authorization": f"bearer  {key} "}).status == 200
    assert_refused(client.get(f"{KEYS}?api_key={key}"))


def test_off_means_nobody(app: Flask) -> None:
    use(app, auth="off")
    client = AppClient(app, REMOTE_ADDR="192.0.2.7")
    assert client.get(KEYS).status == 200
    assert client.get(KEYS, headers=bearer("anything")).status == 200


def test_one_401_for_whatever_is_wrong_with_a_key(app: Flask, client: AppClient, make: Make, sql: Sql) -> None:
    use(app, auth="on")
    good, revoked, expired = make("admin"), make("reader"), make("reader", lifetime=timedelta(seconds=1))
    sql("UPDATE api_keys SET revoked_at = now() WHERE id = %s", revoked.split("_")[1])
    sql("UPDATE api_keys SET expires_at = now() WHERE id = %s", expired.split("_")[1])
    wrong = [good[:-1] + ("0" if good[-1] != "0" else "1"), good.upper(), good + "0", good[:-1], "x", "loom_", " "]
    unknown = f"loom_{'0' * 16}_{'0' * 64}"
    for key in (*wrong, unknown, revoked, expired, "ü" * 50):
        header = key.encode().decode("latin-1")
        assert_refused(client.get(LOCKS, headers={"X-API-Key": header}))
        assert_refused(client.get(LOCKS, headers=bearer(header)))
        assert client.get("/health", headers={"X-API-Key": header}).status == 200
    assert client.get(LOCKS, headers=bearer(good)).status == 200


def test_a_new_key_is_taken_at_once_and_a_revoked_one_within_six_seconds(
    app: Flask, client: AppClient, instance: Instance, sql: Sql, make: Make
) -> None:
    """Also one that was revoked by hand, and by an instance whose heartbeat is late."""
    use(app, auth="on")
    with instance._beating:  # no heartbeat meanwhile
        key = make("reader")
        assert client.get(LOCKS, headers=bearer(key)).status == 200
        started = time.monotonic()
        sql("UPDATE api_keys SET revoked_at = now()")
        wait_until(lambda: client.get(LOCKS, headers=bearer(key)).status == 401, 20)
        assert time.monotonic() - started < 6.5


def test_a_heartbeat_brings_what_has_changed_and_requests_cost_no_statement(
    app: Flask, client: AppClient, instance: Instance, sql: Sql, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(app, auth="on")
    monkeypatch.setattr(keys, "TRUST", 60.0)
    reader, admin = make("reader"), make("admin")
    instance.beat()
    with db.connection() as conn:
        texts: list[str] = []
        execute = type(conn).execute
        monkeypatch.setattr(
            type(conn), "execute", lambda self, text, *more, **m: texts.append(text) or execute(self, text, *more, **m)
        )
    for _ in range(20):
        assert client.get(LOCKS, headers=bearer(reader)).status == 200
    assert not [text for text in texts if "valid_keys" in text]
    instance.beat()
    assert sql("SELECT count(*) FROM api_keys WHERE last_used_at > now() - interval '1 minute'") == [(1,)]
    number = "SELECT number FROM key_changes"
    before = sql(number)
    client.get(LOCKS, headers=bearer(reader))
    instance.beat()
    assert sql(number) == before, "a use is no change"
    sql("UPDATE api_keys SET expires_at = clock_timestamp() WHERE role = 'reader'")
    instance.beat()
    assert_refused(client.get(LOCKS, headers=bearer(reader)))
    assert client.get(KEYS, headers=bearer(admin)).status == 200


def test_guessing_does_not_load_the_database(
    app: Flask, client: AppClient, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(app, auth="on")
    key = make("reader")
    assert client.get(LOCKS, headers=bearer(key)).status == 200
    looks = []
    refresh = keys.Keys._refresh
    monkeypatch.setattr(keys.Keys, "_refresh", lambda self, oldest: looks.append(oldest) or refresh(self, oldest))
    started = time.monotonic()
    statuses = {client.get(LOCKS, headers=bearer(f"loom_{n:016x}_{0:064x}")).status for n in range(200)}
    seconds = time.monotonic() - started
    assert statuses == {401, 503}
    assert len(looks) <= keys.LOOKS_PER_SECOND * (seconds + 2)
    assert client.get(LOCKS, headers=bearer(key)).status == 200


def test_without_database_and_fresh_knowledge_no_key_is_taken(
    app: Flask, client: AppClient, instance: Instance, database: db.Database, make: Make
) -> None:
    use(app, auth="on")
    key = make("reader")
    assert client.get(LOCKS, headers=bearer(key)).status == 200
    instance.keys._read_at -= 7
    with database._lock:
        database._set_away("of the test")
    answer = client.get("/api/v1/nothing", headers=bearer(key))
    assert_problem(answer, 503, "unavailable")
    assert client.get("/health", headers=bearer(key)).status == 503
    assert client.get("/health/live", headers=bearer(key)).status == 200


def test_a_stranger_learns_whether_it_is_healthy_and_no_host_role_or_text_of_the_database(
    app: Flask, database: db.Database, make: Make
) -> None:
    stranger, key = AppClient(app, REMOTE_ADDR="192.0.2.7"), bearer(make("reader"))
    assert list(stranger.get("/health").json) == ["healthy", "instance_id", "database", "active_instances"]
    assert stranger.get(LOCKS, headers=key).status == 200
    assert "version" in stranger.get("/health", headers=key).json
    with database._lock:
        database._set_away("connection to server at db.internal failed for user loom_user")
    for path in ("/health", "/health/ready", "/health/live", "/api/v1/health", LOCKS):
        assert b"loom_user" not in stranger.get(path).body


def test_prometheus_may_read_metrics_from_listed_addresses(app: Flask, make: Make) -> None:
    use(app, auth="on", metrics_addresses=("192.0.2.0/24", "2001:db8::1"))
    for address, status in (("192.0.2.7", 200), ("2001:db8::1", 200), ("192.0.3.7", 401), ("127.0.0.1", 401)):
        client = AppClient(app, REMOTE_ADDR=address)
        assert client.get("/metrics").status == status
        assert_refused(client.get(LOCKS))
    forwarded = AppClient(app, REMOTE_ADDR="192.0.2.7", HTTP_X_FORWARDED_FOR="192.0.3.7")
    assert_refused(forwarded.get("/metrics"))
    assert forwarded.get("/metrics", headers=bearer(make("reader"))).status == 200


def test_administrators_create_rotate_and_revoke_keys_over_http(app: Flask, client: AppClient, make: Make) -> None:
    use(app, auth="on")
    me = bearer(make("admin", "ops"))
    made = client.post(KEYS, {"principal": "agent-7", "role": "agent", "note": "vm 7"}, headers=me)
    assert (made.status, made.json["created_by"], made.json["expires_at"]) == (201, "ops", None)
    first = made.json["key"]
    assert client.post(f"{LOCKS}/build", headers=bearer(first)).status == 201
    listed = client.get(KEYS, headers=me)
    assert [key["principal"] for key in sorted(listed.json, key=lambda k: k["created_at"])] == ["ops", "agent-7"]
    assert first not in listed.body.decode()
    one = f"{KEYS}/{made.json['id']}"
    assert client.get(one, headers=me).json["note"] == "vm 7"

    rotated = client.post(f"{one}/rotate", {"overlap_seconds": 2}, headers=me)
    assert (rotated.status, rotated.json["principal"], rotated.json["role"]) == (201, "agent-7", "agent")
    for key in (first, rotated.json["key"]):
        assert client.get(LOCKS, headers=bearer(key)).status == 200, "both are valid for a while"
    wait_until(lambda: client.get(LOCKS, headers=bearer(first)).status == 401, 20)
    assert client.get(LOCKS, headers=bearer(rotated.json["key"])).status == 200
    for _ in range(2):
        assert client.delete(f"{KEYS}/{rotated.json['id']}", headers=me).status == 204
    wait_until(lambda: client.get(LOCKS, headers=bearer(rotated.json["key"])).status == 401, 20)
    assert_problem(client.post(f"{one}/rotate", headers=me), 409, "conflict")
    assert_problem(client.delete(f"{KEYS}/none", headers=me), 404, "not-found")


@pytest.mark.parametrize("principal", ["", "a/b", "a\nb", "system:upkeep", "sql:loom", "local", "anonymous", "x" * 201])
def test_a_key_cannot_be_for_who_needs_none(client: AppClient, principal: str) -> None:
    answer = client.post(KEYS, {"principal": principal, "role": "agent"})
    assert assert_problem(answer, 400, "invalid")["errors"][0]["field"] == "principal"


def test_a_new_key_is_in_no_stored_answer(client: AppClient, sql: Sql) -> None:
    for path, body in ((KEYS, {"principal": "p", "role": "agent"}), (f"{KEYS}/x/rotate", {})):
        answer = client.post(path, body, headers={"Idempotency-Key": "k"})
        assert assert_problem(answer, 400, "invalid")["errors"][0]["field"] == "Idempotency-Key"
    assert sql("SELECT * FROM idempotency_keys") == []


def test_the_last_key_of_an_administrator_stays(app: Flask, client: AppClient, make: Make) -> None:
    use(app, auth="on")
    mine, other = make("admin", "a"), make("admin", "b")
    ids = [key.split("_")[1] for key in (mine, other)]
    assert client.delete(f"{KEYS}/{ids[1]}", headers=bearer(mine)).status == 204
    assert_problem(client.delete(f"{KEYS}/{ids[0]}", headers=bearer(mine)), 409, "last-admin-key")
    new = client.post(f"{KEYS}/{ids[0]}/rotate", {"overlap_seconds": 600}, headers=bearer(mine)).json
    assert client.delete(f"{KEYS}/{ids[0]}", headers=bearer(new["key"])).status == 204
    assert client.get(KEYS, headers=bearer(new["key"])).status == 200


def test_a_route_that_says_not_who_may_use_it_keeps_the_application_from_starting(app: Flask) -> None:
    permissions.check(app.url_map.iter_rules())
    rules = [rule for rule in app.url_map.iter_rules() if rule.rule != KEYS]
    with pytest.raises(RuntimeError, match="/api/v1/keys, which serves nothing"):
        permissions.check(rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(permissions._NEEDED, KEYS)
        with pytest.raises(RuntimeError, match="/api/v1/keys, which serves GET, POST"):
            permissions.check(app.url_map.iter_rules())
        assert permissions.needed(KEYS, "GET") == permissions.ADMIN


@pytest.mark.parametrize("role", ["reader", "agent", "admin"])
def test_each_role_may_do_what_the_table_says(app: Flask, client: AppClient, make: Make, role: keys.Role) -> None:
    """Every method of every rule, with the key of a role: 401 and 403 where the table says so, and nowhere else."""
    use(app, auth="on")
    key, rank = bearer(make(role, "walker")), permissions.RANKS.index(role)
    make("admin", "other")
    for rule in app.url_map.iter_rules():
        for method in (rule.methods or set()) - {"OPTIONS"}:
            path = rule.rule
            for argument in ("<key>", "<key_id>", "<instance_id>", "<name:_>"):
                path = path.replace(argument, "none")
            needed = permissions.needed(rule.rule, method)
            assert (client.request(method, path).status == 401) == (needed > permissions.OPEN), (method, path)
            answer = client.request(method, path, headers=key)
            assert answer.status != 401, (method, path)
            if rank < needed:
                if method != "HEAD" and "page" not in rule.endpoint:  # whose errors are pages
                    assert_problem(answer, 403, "forbidden")
                assert answer.status == 403, (method, path)
