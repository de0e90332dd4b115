"""An agent that lives keeps its beads; one that died gives them back."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg2.extensions
import pytest
from harness import AppClient
from harness.locks import Sql, acquire, assert_problem, force
from harness.work import (
    AGENTS,
    PROJECT,
    ask,
    assert_counted,
    assert_lost,
    bead,
    beat,
    claim,
    claim_next,
    complete,
    fail,
    get,
    lapse,
    make,
    release,
    team,
)

from loom.config import BeadsConfig, Config
from loom.instances import Instance
from loom.upkeep import Upkeep

HEARTBEAT = f"{AGENTS}/a/heartbeat"


@pytest.fixture
def work(client: AppClient) -> AppClient:
    """A client, with a project, the agents a and b, and the beads x, y and z."""
    team(client, "a", "b")
    for key in ("x", "y", "z"):
        bead(client, key)
    return client


@pytest.fixture
def cleaner(instance: Instance) -> Upkeep:
    return Upkeep(Config(), instance)


def silent(sql: Sql, seconds: int = 121, agent: str = "a") -> None:
    """Since when nobody has heard from the agent."""
    sql("UPDATE agents SET heartbeat_at = clock_timestamp() - %s WHERE id = %s", timedelta(seconds=seconds), agent)


def status(client: AppClient, agent: str = "a") -> str:
    return client.get(f"{AGENTS}/{agent}").json["status"]


def test_only_what_the_agent_still_works_on_is_kept_for_it(work: AppClient, sql: Sql) -> None:
    tokens = {key: claim(work, key, lease_seconds=seconds) for key, seconds in (("x", 60), ("y", 600), ("z", 60))}
    sql("UPDATE beads SET lease_expires_at = clock_timestamp() + INTERVAL '5 s'")
    extended = beat(work, claims={"x": tokens["x"], "y": tokens["y"]})
    assert extended["lost"] == {}
    left = "SELECT round(extract(epoch FROM lease_expires_at - clock_timestamp()) / 10) * 10 FROM beads ORDER BY id"
    assert [int(seconds) for (seconds,) in sql(left)] in ([60, 600, 0], [60, 600, 10])
    assert extended["extended"] == {key: get(work, key)["lease_expires_at"] for key in ("x", "y")}


def test_a_heartbeat_shortens_no_lease_and_is_no_change(work: AppClient, sql: Sql) -> None:
    token = claim(work, "x", lease_seconds=60)
    sql("UPDATE beads SET lease_expires_at = clock_timestamp() + INTERVAL '1 h' WHERE id = 'x'")
    before, agent = get(work, "x"), work.get(f"{AGENTS}/a")
    events = sql("SELECT count(*) FROM events")
    assert beat(work, claims={"x": token})["extended"] == {"x": before["lease_expires_at"]}
    assert get(work, "x") == before
    after = work.get(f"{AGENTS}/a")
    assert (after.json["version"], after.headers["ETag"]) == (agent.json["version"], agent.headers["ETag"])
    assert after.json["last_active"] > agent.json["last_active"]
    assert sql("SELECT count(*) FROM events") == events


def test_an_agent_is_told_what_it_has_lost_and_how(work: AppClient, sql: Sql) -> None:
    bead(work, "w")
    tokens = {key: claim(work, key) for key in ("x", "y", "z", "w")}
    complete(work, "x", tokens["x"])
    fail(work, "y", tokens["y"], retry_after_seconds=0)
    claim(work, "y", "b")
    lapse(sql, "z")
    release(work, "w", tokens["w"])
    given = {**tokens, "none": 17}
    lost = {"x": "completed", "y": "failed", "z": "lapsed", "w": "released", "none": None}
    assert beat(work, claims=given) == {"extended": {}, "lost": lost}
    assert claim_next(work, "b") is not None
    assert beat(work, claims={"z": tokens["z"]})["lost"] == {"z": "lapsed"}


def test_a_restarted_agent_does_not_keep_alive_what_it_claimed_anew(work: AppClient) -> None:
    old = claim(work, "x")
    release(work, "x", old)
    claim(work, "x", lease_seconds=10)
    ends = get(work, "x")["lease_expires_at"]
    assert beat(work, claims={"x": old}) == {"extended": {}, "lost": {"x": "released"}}
    assert get(work, "x")["lease_expires_at"] == ends


def test_an_agent_keeps_nobody_elses_claim_alive(work: AppClient, sql: Sql) -> None:
    token = claim(work, "x", lease_seconds=10)
    before = get(work, "x")["lease_expires_at"]
    assert beat(work, "b", claims={"x": token}) == {"extended": {}, "lost": {"x": None}}
    assert get(work, "x")["lease_expires_at"] == before


@pytest.mark.usefixtures("server_age")
@pytest.mark.parametrize(
    ("locked", "problem"),
    [
        ("agents WHERE id = 'a'", "its row is locked"),
        ("beads WHERE id = 'x'", "the row of a bead is locked"),
    ],
)
def test_a_locked_row_keeps_no_other_dead_agent_alive(
    work: AppClient,
    sql: Sql,
    cleaner: Upkeep,
    session: Callable[[], psycopg2.extensions.connection],
    caplog: pytest.LogCaptureFixture,
    locked: str,
    problem: str,
) -> None:
    for agent, key in (("a", "x"), ("b", "y"), ("a", "z")):
        beat(work, agent)
        claim(work, key, agent)
        silent(sql, 200, agent)
    with session() as conn, conn.cursor() as cursor:
        cursor.execute(f"SELECT FROM {locked} FOR UPDATE")
        cleaner.clean()
        assert (status(work), status(work, "b")) == ("idle", "dead")
        assert (get(work, "x")["status"], get(work, "y")["status"]) == ("in_progress", "open")
        assert get(work, "z")["status"] == ("open" if "beads" in locked else "in_progress"), "its other bead is free"
    (skipped,) = (record.fields for record in caplog.records if record.msg == "upkeep-skipped")
    assert skipped == {"part": "agents", "rows": {"a": problem}}
    cleaner.clean()
    assert (status(work), get(work, "x")["status"]) == ("dead", "open")
    assert_counted(sql)


@pytest.mark.usefixtures("server_age")
def test_a_dead_agents_beads_come_back(work: AppClient, sql: Sql, cleaner: Upkeep) -> None:
    beat(work)
    token = claim(work, "x", lease_seconds=86400)
    make(work, "/api/v1/beads", id="kept", title="t", project_id=PROJECT, assigned_to="a")
    silent(sql, 110)
    cleaner.clean()
    assert (status(work), get(work, "x")["status"]) == ("idle", "in_progress")
    silent(sql)
    cleaner.clean()
    found = get(work, "x")
    assert (status(work), found["status"], found["attempts"]) == ("dead", "open", 1)
    assert "assigned_to" not in found
    assert get(work, "kept")["assigned_to"] == "a"
    assert claim_next(work, "b") == "x"
    assert_lost(complete(work, "x", token), "agent-died", "b")
    assert beat(work, claims={"x": token})["lost"] == {"x": "agent-died"}
    assert status(work) == "idle"
    assert sql(
        "SELECT type, actor, changes ->> 'status' FROM events WHERE entity_id = 'a' AND version > 1 ORDER BY place"
    ) == [("agent.status_change", "system:upkeep", "dead"), ("agent.status_change", "a", "idle")]
    assert_counted(sql)


@pytest.mark.usefixtures("server_age")
def test_a_dead_agents_bead_is_taken_over_before_anybody_cleans(work: AppClient, sql: Sql) -> None:
    beat(work)
    claim(work, "x")
    silent(sql)
    assert ask(work, "x", "b").json["bead"]["attempts"] == 1
    assert sql("SELECT ended_how FROM claims") == [("agent-died",)]


@pytest.mark.usefixtures("server_age")
def test_who_was_told_that_its_lease_is_over_is_told_no_other_end_once_it_is_dead(
    work: AppClient, sql: Sql, cleaner: Upkeep
) -> None:
    beat(work)
    token = claim(work, "x")
    lapse(sql, "x")
    assert_lost(complete(work, "x", token), "lapsed")
    silent(sql)
    cleaner.clean()
    assert status(work) == "dead"
    assert_lost(complete(work, "x", token), "lapsed")
    assert get(work, "x")["attempts"] == 1


@pytest.mark.usefixtures("server_age")
def test_who_has_never_sent_a_heartbeat_does_not_die_of_it(work: AppClient, sql: Sql, cleaner: Upkeep) -> None:
    claim(work, "x")
    sql("UPDATE agents SET last_active = clock_timestamp() - INTERVAL '1 day', started_at = last_active")
    cleaner.clean()
    assert status(work) == "idle"
    assert_problem(ask(work, "x", "b"), 409, "bead-claimed")


@pytest.mark.parametrize("server_age", ["55 seconds"], indirect=True)
@pytest.mark.usefixtures("server_age")
def test_nobody_dies_in_the_first_minute_of_the_database(work: AppClient, sql: Sql, cleaner: Upkeep) -> None:
    beat(work)
    claim(work, "x")
    silent(sql, 3600)
    cleaner.clean()
    assert status(work) == "idle"
    assert_problem(ask(work, "x", "b"), 409, "bead-claimed")


@pytest.mark.usefixtures("server_age")
def test_nobody_dies_in_the_first_minute_after_an_outage(work: AppClient, sql: Sql, cleaner: Upkeep) -> None:
    beat(work)
    silent(sql, 3600)
    sql("UPDATE cluster SET outage_ended_at = clock_timestamp() - INTERVAL '50 seconds'")
    cleaner.clean()
    assert status(work) == "idle"
    sql("UPDATE cluster SET outage_ended_at = clock_timestamp() - INTERVAL '70 seconds'")
    cleaner.clean()
    assert status(work) == "dead"


@pytest.mark.usefixtures("server_age")
def test_what_is_locked_from_outside_is_not_taken_from_the_dead(work: AppClient, sql: Sql, cleaner: Upkeep) -> None:
    beat(work)
    claim(work, "x")
    claim(work, "y")
    locks = {name: acquire(work, name, owner="operator")["fencing_token"] for name in ("agent:a", "bead:x")}
    silent(sql)
    cleaner.clean()
    assert status(work) == "idle"
    force(work, locks["agent:a"], "agent:a")
    cleaner.clean()
    assert [status(work), get(work, "x")["status"], get(work, "y")["status"]] == ["dead", "in_progress", "open"]
    cleaner.clean()
    assert get(work, "x")["status"] == "in_progress"
    force(work, locks["bead:x"], "bead:x")
    cleaner.clean()
    assert get(work, "x")["status"] == "open"
    assert_counted(sql)


@pytest.mark.usefixtures("server_age")
def test_the_limits_of_the_configuration_count_for_the_dead_too(work: AppClient, sql: Sql, instance: Instance) -> None:
    claim(work, "x")
    silent(sql)
    Upkeep(Config(beads=BeadsConfig(max_attempts=1)), instance).clean()
    assert get(work, "x")["blocked_reason"] == "claimed 1 times without success, the last time: agent-died"


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
def test_an_agent_that_an_operator_ends_gives_its_beads_back(work: AppClient, sql: Sql, method: str) -> None:
    token = claim(work, "x")
    assert work.request(method, f"{AGENTS}/a", {"status": "dead"}).status in (200, 204)
    assert (get(work, "x")["status"], get(work, "x")["attempts"]) == ("open", 1)
    assert_lost(complete(work, "x", token), "agent-died")
    assert_counted(sql)


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
def test_the_limits_of_the_configuration_count_when_an_operator_ends_an_agent(work: AppClient, method: str) -> None:
    work._app.config["LOOM"] = Config(beads=BeadsConfig(max_attempts=1))
    claim(work, "x")
    assert work.request(method, f"{AGENTS}/a", {"status": "dead"}).status in (200, 204)
    assert get(work, "x")["blocked_reason"] == "claimed 1 times without success, the last time: agent-died"


def test_a_dead_agent_that_claims_lives(work: AppClient, sql: Sql) -> None:
    work.request("PATCH", f"{AGENTS}/a", {"status": "dead"})
    claim(work, "x")
    assert status(work) == "idle"
    assert sql("SELECT heartbeat_at FROM agents WHERE id = 'a'") == [(None,)]  # it may live without them, as before


def test_an_agent_says_what_it_does(work: AppClient) -> None:
    beat(work, status="working", more="?")
    assert status(work) == "working"
    assert work.get(f"{AGENTS}/a").json["version"] == 2
    beat(work, status="working")
    assert work.get(f"{AGENTS}/a").json["version"] == 2


def test_a_repeated_heartbeat_tells_how_it_is_now(work: AppClient, sql: Sql) -> None:
    token = claim(work, "x")

    def once() -> Any:
        return work.post(HEARTBEAT, {"claims": {"x": token}}, headers={"Idempotency-Key": "k"}).json

    assert list(once()["extended"]) == ["x"]
    lapse(sql, "x")
    assert once() == {"extended": {}, "lost": {"x": "lapsed"}}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"status": "dead"}, "status"),
        ({"status": "asleep"}, "status"),
        ({"claims": ["x"]}, "claims"),
        ({"claims": {"x": "17"}}, "claims.x"),
        ({"claims": {"x": 0}}, "claims.x"),
        ({"claims": {str(n): 1 for n in range(1001)}}, "claims"),
        ({"claims": {"x\u0000": 1}}, "claims.x\\u0000"),
    ],
)
def test_bad_input_is_named(work: AppClient, body: Any, field: str) -> None:
    problem = assert_problem(work.post(HEARTBEAT, body), 400, "invalid")
    assert problem["errors"][0]["field"] == field


def test_an_agent_that_is_not_there_is_404(work: AppClient) -> None:
    token = claim(work, "x", lease_seconds=10)
    before = get(work, "x")["lease_expires_at"]
    answer = work.post(f"{AGENTS}/none/heartbeat", {"claims": {"x": token}})
    assert_problem(answer, 404, "not-found", detail="Agent not found")
    assert get(work, "x")["lease_expires_at"] == before
