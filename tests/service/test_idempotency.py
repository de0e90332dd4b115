"""A retry is safe: one Idempotency-Key is applied once and answered the same, but never what is no longer true."""

from __future__ import annotations

import contextlib
import socket
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg2.extensions
import pytest
from flask import Blueprint, Flask, Response, request
from harness import AppClient, wait_until
from harness.client import Answer
from harness.locks import (
    BUILD,
    LOCKS,
    Sql,
    acquire,
    assert_lost,
    assert_problem,
    force,
    instant,
    release,
    seconds,
    wait_expired,
)
from werkzeug.datastructures import Headers

from loom import db, errors
from loom.config import Config
from loom.db.connection import Connection
from loom.http import answer, idempotency, pollers
from loom.instances import Instance
from loom.routes import create_app
from loom.upkeep import Upkeep

Session = Callable[[], psycopg2.extensions.connection]

THINGS = "/things"
GRANTED = "SELECT 1 FROM distributed_locks WHERE owner <> 'holder'"
COUNT = "SELECT n, count(*) FROM things GROUP BY n ORDER BY n"


class Things:
    """A blueprint with views that write, each in its own way; `runs` counts how often one ran."""

    def __init__(self) -> None:
        self.runs = 0
        self.meanwhile: Callable[[], object] = lambda: None
        self.bp = Blueprint("things", __name__, url_prefix=THINGS)
        self.bp.post("")(self.make)
        self.bp.post("/<name>")(self.make)
        self.bp.post("/both")(self.both)
        self.bp.post("/after")(self.after)
        self.bp.put("")(self.make)
        self.bp.post("/claim")(lambda: idempotency.once(claim, refresh=self.still))

    def make(self, name: str = "") -> Response:
        return idempotency.once(self._make)

    def _make(self, conn: db.Connection) -> Response:
        """Inserts two rows over two connections; then fails if the body asks for it."""
        self.runs += 1
        body = request.get_json(force=True)
        for _ in range(2):
            with db.connection() as conn:
                db.run(conn, "INSERT INTO things VALUES (%(n)s)", n=body["n"])
        self.meanwhile()
        if body.get("fail"):
            raise errors.NotFound("Told to fail.")
        if body.get("status"):
            return answer.json({}, body["status"])
        return answer.json({"made": str(uuid.uuid4())}, 201, {"ETag": '"1"', "Location": "/things/1"})

    def both(self) -> Response:
        how = request.get_json(force=True)["how"]
        return idempotency.once(self._both, in_transaction=how == "transaction")

    def _both(self, conn: db.Connection) -> Response:
        """Increments two rows in the order of the request: two requests in opposite orders deadlock."""
        self.runs += 1
        body = request.get_json(force=True)
        if body["how"] == "statement":
            with db.connection() as conn:
                db.run(conn, "SELECT count_both(%(a)s, %(b)s)", a=body["rows"][0], b=body["rows"][1])
        else:
            with db.transaction() as conn:
                for row in body["rows"]:
                    db.run(conn, "UPDATE counters SET n = n + 1 WHERE id = %(id)s", id=row)
                    self.meanwhile()
        return answer.json({}, 201)

    def after(self) -> Response:
        commits_first = bool(request.get_json(force=True).get("first"))
        return idempotency.once(self._after, in_transaction=not commits_first)

    def _after(self, conn: db.Connection) -> Response:
        """Runs the SQL of the request in a transaction; before, if the request asks for it, it commits one row."""
        self.runs += 1
        body = request.get_json(force=True)
        if body.get("first"):
            with db.connection() as conn:
                db.run(conn, "INSERT INTO things VALUES (1)")
        with db.transaction() as conn:
            db.run(conn, body["sql"])
        return answer.json({}, 201)

    def still(self, conn: db.Connection, first: dict[str, Any]) -> dict[str, Any]:
        self.runs += 1
        row = db.one(conn, "SELECT n FROM things WHERE n = %(n)s", n=first["claimed"])
        if row is None:
            raise errors.LockLost("The thing has gone.")
        return {"claimed": row["n"], "again": True}


def claim(conn: db.Connection) -> Response:
    row = db.one(conn, "SELECT n FROM things ORDER BY n LIMIT 1")
    return answer.json({"claimed": row["n"]}) if row else answer.nothing()


@pytest.fixture
def app(config: Config, instance: Instance) -> Flask:
    """One with routes of its own, to which `things` adds."""
    return create_app(config)


@pytest.fixture
def things(app: Flask, sql: Sql) -> Things:
    sql("CREATE TABLE things (n int)")
    things = Things()
    app.register_blueprint(things.bp)
    return things


def keyed(client: AppClient, path: str, body: Any = None, key: str = "k") -> Answer:
    return client.post(path, body, headers={"Idempotency-Key": key})


def assert_replays(first: Answer, again: Answer) -> None:
    assert (again.status, again.body) == (first.status, first.body)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert "Idempotency-Replayed" not in first.headers
    assert kept(again.headers) == kept(first.headers)


def kept(headers: Headers) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in ("Idempotency-Replayed", "X-Request-ID")}


# Applied once, answered the same


@pytest.mark.usefixtures("things")
def test_a_retry_gets_the_same_answer_byte_for_byte_and_changes_nothing(client: AppClient, sql: Sql) -> None:
    first = keyed(client, THINGS, {"n": 1})
    assert first.status == 201
    for _ in range(3):
        again = keyed(client, THINGS, {"n": 1})
        assert_replays(first, again)
        assert (again.headers["ETag"], again.headers["Location"]) == ('"1"', "/things/1")
    assert sql(COUNT) == [(1, 2)]


def test_an_entity_is_created_once(client: AppClient, sql: Sql) -> None:
    project = {"name": "one", "git_repo": "r", "branch": "main"}
    first = keyed(client, "/api/v1/projects", project)
    again = keyed(client, "/api/v1/projects", project)
    assert first.status == 201
    assert_replays(first, again)
    assert again.headers["ETag"] == '"1"'
    assert sql("SELECT type, count(*) FROM events GROUP BY 1") == [("project.created", 1)]


@pytest.mark.usefixtures("things")
def test_a_key_does_not_affect_other_keys_other_paths_or_requests_without_a_key(client: AppClient, sql: Sql) -> None:
    keyed(client, THINGS, {"n": 1}, "a")
    keyed(client, THINGS, {"n": 1}, "b")
    keyed(client, THINGS + "/x", {"n": 1}, "a")
    for _ in range(2):
        client.post(THINGS, {"n": 1})
    assert sql(COUNT) == [(1, 10)]


def test_callers_do_not_share_keys(
    client: AppClient, things: Things, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    for who in ("one", "other"):
        monkeypatch.setattr(idempotency, "caller", lambda who=who: who)
        assert keyed(client, THINGS, {"n": 1}).status == 201
    assert things.runs == 2


@pytest.mark.usefixtures("things")
def test_a_key_has_an_effect_only_on_post(client: AppClient, sql: Sql) -> None:
    for _ in range(2):
        client.put(THINGS, {"n": 1}, headers={"Idempotency-Key": "k"})
    assert sql(COUNT) == [(1, 4)]


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize(("path", "body"), [(THINGS, {"n": 2}), (THINGS, b'{"n":1} '), (THINGS + "?x=1", {"n": 1})])
def test_a_key_reused_with_another_request_is_refused(client: AppClient, sql: Sql, path: str, body: Any) -> None:
    first = keyed(client, THINGS, {"n": 1})
    assert_problem(keyed(client, path, body), 422, "key-reused")
    assert sql(COUNT) == [(1, 2)]
    assert_replays(first, keyed(client, THINGS, {"n": 1}))


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize("key", ["", " ", "a b", "\x7f", "\xfc", "x" * 256])
def test_an_invalid_key_is_refused_by_name(client: AppClient, sql: Sql, key: str) -> None:
    problem = assert_problem(keyed(client, THINGS, {"n": 1}, key), 400, "invalid")
    assert problem["errors"][0]["field"] == "Idempotency-Key"
    assert sql(COUNT) == []


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize("key", ["!", '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "~" * 255])
def test_the_shortest_and_the_longest_key_are_accepted(client: AppClient, key: str) -> None:
    assert_replays(keyed(client, THINGS, {"n": 1}, key), keyed(client, THINGS, {"n": 1}, key))


@pytest.mark.usefixtures("things")
@pytest.mark.parametrize("how", [{"fail": True}, {"status": 409}])
def test_only_success_is_kept(client: AppClient, things: Things, how: dict[str, Any]) -> None:
    for _ in range(2):
        assert keyed(client, THINGS, {"n": 1, **how}).status in (404, 409)
    assert things.runs == 2


@pytest.mark.usefixtures("things")
def test_a_request_that_failed_has_changed_nothing(client: AppClient, sql: Sql) -> None:
    assert keyed(client, THINGS, {"n": 1, "fail": True}).status == 404
    assert sql(COUNT) == []


def test_a_twin_of_a_request_in_flight_gets_in_progress_and_later_its_answer(
    client: AppClient, things: Things, sql: Sql, session: Session
) -> None:
    blocker = session()
    blocker.cursor().execute("LOCK TABLE things IN SHARE MODE")
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(keyed, client, THINGS, {"n": 1})
        wait_until(lambda: things.runs == 1)
        twin = keyed(client, THINGS, {"n": 1})
        assert_problem(twin, 409, "in-progress")
        assert twin.headers["Retry-After"] == "1"
        blocker.rollback()
        first = future.result(5)
    assert first.status == 201
    assert_replays(first, keyed(client, THINGS, {"n": 1}))
    assert sql(COUNT) == [(1, 2)]


def test_one_of_many_simultaneous_twins_is_applied(client: AppClient, things: Things, sql: Sql) -> None:
    with ThreadPoolExecutor(8) as threads:
        for n in range(20):
            answers = list(threads.map(lambda _, n=n: keyed(client, THINGS, {"n": n}, f"k{n}"), range(8)))
            assert {a.status for a in answers} <= {201, 409}
            assert len({a.body for a in answers if a.status == 201}) == 1
    assert sql(COUNT) == [(n, 2) for n in range(20)]


@pytest.mark.usefixtures("things")
def test_an_answer_is_kept_for_a_day(client: AppClient, sql: Sql, instance: Instance) -> None:
    first = keyed(client, THINGS, {"n": 1}, "young")
    keyed(client, THINGS, {"n": 2}, "old")
    for key, age in (("young", timedelta(hours=23, minutes=59)), ("old", timedelta(hours=24, minutes=1))):
        sql("UPDATE idempotency_keys SET created_at = created_at - %s WHERE key = %s", age, key)
    Upkeep(Config(), instance).clean()
    assert_replays(first, keyed(client, THINGS, {"n": 1}, "young"))
    assert keyed(client, THINGS, {"n": 2}, "old").status == 201
    assert sql(COUNT) == [(1, 2), (2, 4)]


@pytest.mark.usefixtures("things")
def test_a_key_costs_two_messages(client: AppClient, sent: list[str]) -> None:
    """BEGIN with the look-up of the key, and the stored answer with COMMIT."""
    keyed(client, THINGS, {"n": 1})
    assert [text.split()[0] for text in sent] == ["SELECT", "INSERT", "INSERT", "INSERT"]
    assert sent[-1].endswith("; COMMIT")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the messages that requests send to the database from now on."""
    texts: list[str] = []
    execute, end = Connection._execute, Connection.end

    def note(conn: Connection, sql: str, *more: Any) -> Any:
        texts.append(sql.strip())
        return execute(conn, sql, *more)

    def note_end(conn: Connection, how: str) -> None:
        if conn._begun:
            texts.append(how)
        end(conn, how)

    monkeypatch.setattr(Connection, "_execute", note)
    monkeypatch.setattr(Connection, "end", note_end)
    return texts


# Every POST takes a key, and is checked before a stored answer is looked up


SHOWN_ONCE = {"/api/v1/keys", "/api/v1/keys/<key_id>/rotate"}  # the answer is stored nowhere
EVERY_POST = {
    "/api/v1/locks/<name:_>": ("locks/build", {}),
    "/api/v1/providers": ("providers", {"id": "gpt", "name": "gpt"}),
    "/api/v1/projects": ("projects", {"id": "p2", "name": "p2", "git_repo": "r", "branch": "main"}),
    "/api/v1/agents": ("agents", {"id": "a2", "persona_name": "x", "project_id": "p"}),
    "/api/v1/beads": ("beads", {"title": "t", "project_id": "p"}),
    "/api/v1/beads/bulk": ("beads/bulk", {"beads": [{"title": "t", "project_id": "p"}]}),
    "/api/v1/beads/<key>/claim": ("beads/b1/claim", {"agent_id": "a"}),
    "/api/v1/beads/claim": ("beads/claim", {"agent_id": "a"}),
    "/api/v1/beads/<key>/complete": ("beads/b3/complete", {"fencing_token": "b3"}),
    "/api/v1/beads/<key>/fail": ("beads/b4/fail", {"fencing_token": "b4"}),
    "/api/v1/beads/<key>/redispatch": ("beads/b1/redispatch", {}),
    "/api/v1/logs": ("logs", {"provider_id": "gpt"}),
    "/api/v1/beads/<key>/comments": ("beads/b1/comments", {"content": "c"}),
    "/api/v1/agents/<key>/heartbeat": ("agents/a/heartbeat", {}),
    "/api/v1/projects/<key>/agents": ("projects/p/agents", {"agent_id": "a"}),
    "/api/v1/projects/<key>/close": ("projects/empty/close", {"author_id": "me"}),
    "/api/v1/projects/<key>/reopen": ("projects/empty/reopen", {"author_id": "me"}),
    "/api/v1/projects/<key>/comments": ("projects/p/comments", {"author_id": "me", "comment": "c"}),
    "/api/v1/file-locks": ("file-locks", {"file_path": "f", "project_id": "p", "agent_id": "a"}),
    "/api/v1/config/import.yaml": ("config/import.yaml", b"team: red"),
}


def test_every_post_takes_a_key_and_bad_headers_are_refused_before_a_replay(app: Flask, client: AppClient) -> None:
    rules = {rule.rule for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())}
    rules = {rule for rule in rules if not rule.startswith(("/actions/", "/api/v1/keys"))}  # a key is shown once
    assert rules - SHOWN_ONCE == EVERY_POST.keys()
    for project in ("p", "empty"):
        client.post("/api/v1/projects", {"id": project, "name": project, "git_repo": "r", "branch": "main"})
    client.post("/api/v1/agents", {"id": "a", "persona_name": "x", "project_id": "p"})
    tokens = {}
    for bead in ("b1", "b2", "b3", "b4"):
        client.post("/api/v1/beads", {"id": bead, "title": bead, "project_id": "p"})
    for bead in ("b3", "b4"):
        tokens[bead] = client.post(f"/api/v1/beads/{bead}/claim", {"agent_id": "a"}).json["fencing_token"]
    for rule, (path, given) in EVERY_POST.items():
        body = given
        if isinstance(given, dict) and given.get("fencing_token") in tokens:
            body = {"fencing_token": tokens[given["fencing_token"]]}
        first = keyed(client, f"/api/v1/{path}", body, key=rule)
        assert first.status in (200, 201), (rule, first)
        again = keyed(client, f"/api/v1/{path}", body, key=rule)
        assert (again.status, again.headers.get("Idempotency-Replayed")) == (first.status, "true"), (rule, again)
        for name, value in (("Loom-Lock-Token", "none"), ("Loom-Lock-Token", "0"), ("Loom-Actor", "\x7f")):
            refused = client.post(f"/api/v1/{path}", body, headers={"Idempotency-Key": rule, name: value})
            if rule in ("/api/v1/locks/<name:_>", "/api/v1/logs"):
                assert refused.status == 201, "they read neither header"
            else:
                assert assert_problem(refused, 400, "invalid")["errors"][0]["field"] == name, rule
        if rule in ("/api/v1/beads/bulk", "/api/v1/config/import.yaml"):
            bare = client.post(f"/api/v1/{path}", body, headers={"Idempotency-Key": rule, "Loom-Lock-Token": "17"})
            assert_problem(bare, 400, "invalid")


# Never a success that is no longer true


def test_a_view_can_check_whether_its_answer_is_still_true(client: AppClient, things: Things, sql: Sql) -> None:
    sql("INSERT INTO things VALUES (1)")
    first = keyed(client, THINGS + "/claim", key="a")
    again = keyed(client, THINGS + "/claim", key="a")
    assert (first.json, again.json) == ({"claimed": 1}, {"claimed": 1, "again": True})
    assert again.headers["Idempotency-Replayed"] == "true"
    sql("UPDATE things SET n = 10")
    assert_problem(keyed(client, THINGS + "/claim", key="a"), 409, "lock-lost")


def test_an_answer_of_nothing_to_claim_is_not_kept(client: AppClient, things: Things, sql: Sql) -> None:
    assert keyed(client, THINGS + "/claim").status == 204
    sql("INSERT INTO things VALUES (1)")
    assert keyed(client, THINGS + "/claim").json == {"claimed": 1}


def test_the_key_of_an_acquire_finds_its_grant(client: AppClient, sql: Sql) -> None:
    first = keyed(client, BUILD, {"owner": "a", "ttl_seconds": 60})
    again = keyed(client, BUILD, {"owner": "a", "ttl_seconds": 60})
    assert (first.status, again.status) == (201, 201)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.json["fencing_token"] == first.json["fencing_token"]
    assert seconds(again.json) == 60
    assert instant(again.json["expires_at"]) > instant(first.json["expires_at"]), (
        "clients count from their last request"
    )
    client.put(BUILD, {"fencing_token": first.json["fencing_token"], "ttl_seconds": 600})
    assert (
        keyed(client, BUILD, {"owner": "a", "ttl_seconds": 60}).json["expires_at"]
        == client.get(BUILD).json["expires_at"]
    )
    assert sql("SELECT extract(epoch FROM expires_at - clock_timestamp()) > 590 FROM distributed_locks") == [(True,)]


def test_the_key_of_a_grant_that_ended_never_gets_another(client: AppClient, sql: Sql) -> None:
    def ask(name: str) -> Answer:
        return keyed(client, LOCKS + name, {"owner": "a", "ttl_seconds": 1 if name == "expired" else 60})

    tokens = {name: ask(name).json["fencing_token"] for name in ("released", "forced", "taken", "expired")}
    release(client, tokens["released"], "released")
    force(client, tokens["forced"], "forced")
    release(client, tokens["taken"], "taken")
    acquire(client, "taken", owner="b")
    wait_expired(sql, "expired")
    for _ in range(2):
        assert_lost(ask("released"), "released")
        assert_lost(ask("forced"), "forced")
        assert_lost(ask("taken"), "released", "b")
        assert_lost(ask("expired"), "expired")
    assert [held["lock_name"] for held in client.get(LOCKS[:-1]).json] == ["taken"]


def test_a_refused_acquire_can_be_retried_with_its_key(client: AppClient) -> None:
    held = acquire(client, owner="b")
    assert_problem(keyed(client, BUILD), 409, "lock-held")
    release(client, held["fencing_token"])
    assert keyed(client, BUILD).status == 201


def test_the_generated_owner_of_a_key_is_always_the_same(client: AppClient, sql: Sql) -> None:
    """So a crash between the grant and the storage of its key loses nothing."""
    first = keyed(client, BUILD)
    sql("DELETE FROM idempotency_keys")
    again = keyed(client, BUILD)
    assert (first.status, again.status) == (201, 200)
    assert again.json["fencing_token"] == first.json["fencing_token"]
    assert keyed(client, LOCKS + "other").json["owner"] != first.json["owner"]
    assert_problem(keyed(client, BUILD, key="other"), 409, "lock-held")


def test_a_key_reused_with_another_acquire_is_refused(client: AppClient) -> None:
    keyed(client, BUILD, {"ttl_seconds": 10})
    assert_problem(keyed(client, BUILD, {"ttl_seconds": 20}), 422, "key-reused")


def test_twins_that_wait_share_one_grant_and_hold_no_transaction_open(client: AppClient, sql: Sql) -> None:
    held = acquire(client, owner="holder")
    with ThreadPoolExecutor(2) as threads:
        twins = [threads.submit(keyed, client, BUILD, {"wait_seconds": 20}) for _ in range(2)]
        wait_until(lambda: client.get(BUILD).json["waiting"] == 1)
        idle = "SELECT 1 FROM pg_stat_activity WHERE state LIKE 'idle in%' AND datname = current_database()"
        wait_until(lambda: sql(idle) == [])  # each try is a transaction that ends at once
        release(client, held["fencing_token"])
        answers = [twin.result(20) for twin in twins]
    assert {a.status for a in answers} <= {200, 201}
    assert len({a.json["fencing_token"] for a in answers}) == 1
    assert client.get(BUILD).json["fencing_token"] == answers[0].json["fencing_token"]


def test_twins_of_an_acquire_are_told_the_same_grant(client: AppClient, sql: Sql, session: Session) -> None:
    """The later one waits for the other's answer, and never acquires a grant of its own."""
    blocker = session()
    blocker.cursor().execute("SELECT pg_advisory_xact_lock(hashtextextended('build', 0))")
    with ThreadPoolExecutor(2) as threads:
        twins = [threads.submit(keyed, client, BUILD) for _ in range(2)]
        wait_until(lambda: sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == [(2,)])
        blocker.rollback()
        answers = [twin.result(5) for twin in twins]
    assert [answered.status for answered in answers] == [201, 201]
    assert len({answered.json["fencing_token"] for answered in answers}) == 1
    assert sorted("Idempotency-Replayed" in answered.headers for answered in answers) == [False, True]
    release(client, answers[0].json["fencing_token"])
    assert_lost(keyed(client, BUILD), "released")


def test_a_client_that_disconnected_as_its_grant_came_gets_it_when_it_retries_with_its_key(
    client: AppClient, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = acquire(client, owner="holder")
    with monkeypatch.context() as patched, ThreadPoolExecutor(1) as threads:
        patched.setattr(pollers, "client_gone", lambda environ: sql(GRANTED) != [])
        asked = threads.submit(keyed, client, BUILD, {"wait_seconds": 20})
        wait_until(lambda: client.get(BUILD).json["waiting"] == 1)
        release(client, held["fencing_token"])
        asked.result(5)
    token = client.get(BUILD).json["fencing_token"]
    again = keyed(client, BUILD, {"wait_seconds": 20})
    assert (again.status, again.json["fencing_token"]) == (201, token)


def test_a_twin_that_disconnected_does_not_take_the_grant_from_the_other(
    app: Flask, client: AppClient, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = acquire(client, owner="holder")
    near, far = socket.socketpair()
    poller = app.pollers.locks  # type: ignore[attr-defined]
    with near, far, ThreadPoolExecutor(2) as threads:
        monkeypatch.setattr(pollers, "client_gone", lambda environ: "gunicorn.socket" in environ and sql(GRANTED) != [])
        gone = threads.submit(keyed, AppClient(app, near), BUILD, {"wait_seconds": 20})
        twin = threads.submit(keyed, client, BUILD, {"wait_seconds": 20})
        wait_until(lambda: len(poller._waiters) == 2)
        release(client, held["fencing_token"])
        answered = twin.result(5)
        gone.result(5)
    assert answered.status == 201
    assert client.get(BUILD).json["fencing_token"] == answered.json["fencing_token"]


# Transactions that PostgreSQL rolled back are repeated


BOTH = """
    CREATE TABLE counters (id int PRIMARY KEY, n int NOT NULL DEFAULT 0);
    INSERT INTO counters VALUES (1), (2);
    CREATE FUNCTION count_both(a int, b int) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN
        UPDATE counters SET n = n + 1 WHERE id = a;
        PERFORM pg_sleep(0.5);
        UPDATE counters SET n = n + 1 WHERE id = b;
    END $$
"""
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
# Fails so many times and then succeeds: a rollback does not set a sequence back.
FAILS = "DO $$ BEGIN IF nextval('tries') <= {} THEN RAISE {}; END IF; INSERT INTO things VALUES (2); END $$"


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("how", ["statement", "transaction"])
def test_two_requests_that_deadlock_are_each_applied_once(
    client: AppClient, things: Things, sql: Sql, key: str | None, how: str
) -> None:
    sql(BOTH)
    both_have_one = threading.Barrier(2)

    def meanwhile() -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both_have_one.wait(0.5)

    things.meanwhile = meanwhile
    with ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(
                client.post,
                THINGS + "/both",
                {"how": how, "rows": rows},
                headers={} if key is None else {"Idempotency-Key": key + str(rows[0])},
            )
            for rows in ([1, 2], [2, 1])
        ]
        assert [future.result(10).status for future in asked] == [201, 201]
    assert sql("SELECT n FROM counters") == [(2,), (2,)]
    wait_until(lambda: sql(DEADLOCKS) >= [(1,)])


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("state", ["deadlock_detected", "serialization_failure"])
def test_a_transaction_rolled_back_by_postgresql_is_repeated_three_times(
    client: AppClient, things: Things, sql: Sql, key: str | None, state: str
) -> None:
    headers = {} if key is None else {"Idempotency-Key": key}
    for fails, status, runs in ((3, 201, 4), (4, 503, 4)):
        sql("DROP SEQUENCE IF EXISTS tries; CREATE SEQUENCE tries; DELETE FROM idempotency_keys; DELETE FROM things")
        things.runs = 0
        answered = client.post(THINGS + "/after", {"sql": FAILS.format(fails, state)}, headers=headers)
        assert (answered.status, things.runs) == (status, runs)
        assert sql(COUNT) == ([(2, 1)] if status == 201 else [])
    assert_problem(answered, 503, "busy")
    assert answered.headers["Retry-After"] == "1"


def test_a_request_that_has_committed_something_is_not_repeated(client: AppClient, things: Things, sql: Sql) -> None:
    sql("CREATE SEQUENCE tries")
    body = {"sql": FAILS.format(1, "deadlock_detected"), "first": True}
    assert client.post(THINGS + "/after", body).status == 503
    assert (things.runs, sql(COUNT)) == (1, [(1, 1)])
    sql("SELECT setval('tries', 1, false)")
    assert keyed(client, THINGS + "/after", body).status == 201, "with a key all is one transaction"
    assert (things.runs, sql(COUNT)) == (3, [(1, 2), (2, 1)])


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize(
    "sql_text", ["DO 'BEGIN RAISE lock_not_available; END'", "SELECT pg_terminate_backend(pg_backend_pid())"]
)
def test_no_other_failure_is_repeated(client: AppClient, things: Things, key: str | None, sql_text: str) -> None:
    headers = {} if key is None else {"Idempotency-Key": key}
    assert client.post(THINGS + "/after", {"sql": sql_text}, headers=headers).status == 503
    assert things.runs == 1
