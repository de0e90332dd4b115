"""One agent has a bead at a time, the best ready one first, and whoever lost it is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote

import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.locks import Sql, acquire, assert_problem, force, instant
from harness.work import (
    BEADS,
    PROJECT,
    ask,
    assert_counted,
    assert_lost,
    bead,
    claim,
    claim_next,
    complete,
    fail,
    get,
    lapse,
    make,
    patch,
    release,
    renew,
    team,
)

from loom import upkeep
from loom.config import AgentsConfig, BeadsConfig, Config
from loom.db import Connection
from loom.instances import Instance
from loom.state import claims
from loom.state.writer import Writer
from loom.upkeep import Upkeep

TRACES = ("assigned_to", "fencing_token", "claimed_at", "lease_seconds", "lease_expires_at", "not_before")


@pytest.fixture
def work(client: AppClient) -> AppClient:
    """A client, with a project and the agents a and b."""
    team(client, "a", "b")
    return client


@pytest.fixture
def cleaner(instance: Instance) -> Upkeep:
    return Upkeep(Config(), instance)


def configure(client: AppClient, **sections: Any) -> None:
    client._app.config["LOOM"] = Config(**sections)


def age(sql: Sql, key: str, seconds: int) -> None:
    sql("UPDATE beads SET created_at = clock_timestamp() - %s WHERE id = %s", timedelta(seconds=seconds), key)


def make_bulk(client: AppClient, **fields: Any) -> None:
    make(client, f"{BEADS}/bulk", beads=[{"title": "t", "project_id": PROJECT, **fields}])


def is_free(found: dict[str, Any]) -> bool:
    """Open again, with no trace of who had it."""
    return found["status"] == "open" and not any(name in found for name in TRACES)


# Which bead is the next


def test_the_most_urgent_bead_is_given_first(work: AppClient, sql: Sql) -> None:
    soon, late = (datetime(2030, month, 1, tzinfo=timezone.utc).isoformat() for month in (1, 2))
    bead(work, "old", priority=1)
    bead(work, "late", priority=1, due_date=late)
    bead(work, "new", priority=1)
    bead(work, "soon", priority=1, due_date=soon)
    bead(work, "idle", priority=3, due_date=soon)
    bead(work, "critical", priority=0)
    age(sql, "old", 60)
    assert [claim_next(work) for _ in range(7)] == ["critical", "soon", "late", "old", "new", "idle", None]
    assert_counted(sql)


def test_an_agent_gets_only_what_it_asks_for(work: AppClient) -> None:
    make(work, "/api/v1/projects", id="q", name="q", git_repo="r", branch="main")
    bead(work, "other", project_id="q")
    bead(work, "bug", type="bug", tags=["db", "hot"])
    bead(work, "task", tags=["db"])
    assert claim_next(work, project_id="q", types=["bug"]) is None
    assert claim_next(work, types=["epic", "bug"], tags=["db", "hot", "x"]) is None
    assert claim_next(work, types=["epic", "bug"], tags=["hot", "db"]) == "bug"
    assert claim_next(work, project_id="q") == "other"
    assert claim_next(work, project_id=PROJECT) == "task"
    assert_problem(work.post(f"{BEADS}/claim", {"agent_id": "a", "project_id": "none"}), 400, "invalid")


@pytest.fixture
def many(sql: Sql) -> Callable[[str, str], None]:
    """Adds 20,000 beads that are open, and have these columns besides."""

    def add(columns: str, values: str) -> None:
        sql(
            f"SET session_replication_role = replica; INSERT INTO beads (id, title, project_id, {columns})"
            f" SELECT 'many-' || n, 't', '{PROJECT}', {values} FROM generate_series(1, 20000) AS n"
        )
        sql("VACUUM ANALYZE beads")

    return add


def pages_read(sql: Sql, statement: str) -> int:
    """The pages that a statement looks at, including those of the functions that it calls."""
    sql(statement)  # the first time in a database, catalogs are read, too
    ((explained,),) = sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}")
    return explained[0]["Plan"]["Shared Hit Blocks"] + explained[0]["Plan"]["Shared Read Blocks"]


FILTERS = {
    "type": "claim_next('a', 60, NULL, NULL, '{rare}', NULL)",
    "one of two types": "claim_next('a', 60, NULL, NULL, '{none,rare}', NULL)",
    "type in a project": f"claim_next('a', 60, NULL, '{PROJECT}', '{{rare}}', NULL)",
    "tag": "claim_next('a', 60, NULL, NULL, NULL, '{rare}')",
    "tag in a project": f"claim_next('a', 60, NULL, '{PROJECT}', NULL, '{{rare}}')",
    "tag and type": "claim_next('a', 60, NULL, NULL, '{rare}', '{rare}')",
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_that_few_of_many_ready_beads_fit_does_not_read_the_others(
    work: AppClient, sql: Sql, many: Callable[[str, str], None], name: str
) -> None:
    many("type, tags", "'task', CASE WHEN n % 2 = 0 THEN '{common}' ELSE '{}' END::text[]")
    assert pages_read(sql, f"SELECT {FILTERS[name]}") < 2500, "nothing fits"
    for priority, key in ((3, "later"), (2, "soon")):
        bead(work, key, type="rare", tags=["common", "rare"], priority=priority)
    sql("UPDATE beads SET created_at = '2100-01-01' WHERE id = 'soon'")
    assert sql(f"SELECT {FILTERS[name]} -> 'bead' ->> 'id'") == [("soon",)]
    assert sql(f"SELECT {FILTERS[name]} -> 'bead' ->> 'id'") == [("later",)]


def test_a_claim_takes_a_moment_when_many_delays_are_over(
    work: AppClient, sql: Sql, many: Callable[[str, str], None], cleaner: Upkeep
) -> None:
    """And a lapsed lease behind them is not hidden by them."""
    bead(work, "lapsed")
    claim(work, "lapsed", "b")
    lapse(sql, "lapsed")
    many("not_before", "clock_timestamp() - INTERVAL '1 hour'")
    assert pages_read(sql, "SELECT claim_next('a', 60, NULL)") < 5000
    assert get(work, "lapsed")["attempts"] == 1
    cleaner.clean()
    assert sql("SELECT count(*) FROM beads WHERE not_before IS NOT NULL") == [(0,)]


def test_a_reserved_bead_is_nobody_elses(work: AppClient) -> None:
    bead(work, "mine", assigned_to="a", priority=2)
    bead(work, "better", priority=1)
    bead(work, "worse", priority=3)
    problem = assert_problem(ask(work, "mine", "b"), 409, "bead-claimed")
    assert problem["holder"] == {"agent_id": "a", "alive": True, "lease_expires_at": None}
    assert "PATCH assigned_to" in problem["detail"]
    assert [claim_next(work, "a") for _ in range(2)] == ["better", "mine"]
    assert [claim_next(work, "b") for _ in range(2)] == ["worse", None]


def test_what_waits_for_others_is_given_to_nobody_and_at_once_when_they_are_closed(work: AppClient) -> None:
    bead(work, "first", priority=3)
    bead(work, "second", blocked_by=["first"])
    bead(work, "parent")
    bead(work, "child", parent="parent", blocked_by=["second"])
    problem = assert_problem(ask(work, "second"), 409, "bead-blocked", blocked_by=["first"], children=[])
    assert "blocked_by" in problem["detail"]
    assert_problem(ask(work, "parent"), 409, "bead-blocked", blocked_by=[], children=["child"])
    for key in ("first", "second", "child", "parent"):
        assert claim_next(work) == key
        assert claim_next(work, "b") is None
        assert complete(work, key, claim(work, key)).status == 200


def test_beads_that_are_locked_from_outside_are_passed_over(work: AppClient, sql: Sql) -> None:
    for key in ("one", "two", "mine"):
        bead(work, key)
    patch(work, "mine", assigned_to="a", priority=0)
    held = [acquire(work, f"bead:{key}", owner="operator")["fencing_token"] for key in ("mine", "one")]
    assert [claim_next(work), claim_next(work)] == ["two", None]
    assert force(work, held[0], "bead:mine").status == 204
    assert claim_next(work) == "mine"
    sql(
        "INSERT INTO beads (id, title, project_id, priority)"
        "  SELECT 'h' || i, 't', %s, 0 FROM generate_series(1, 150) AS i",
        PROJECT,
    )
    sql(
        "INSERT INTO distributed_locks SELECT 'bead:' || id, NULL, 'operator', nextval('fencing_tokens'), now(),"
        " now() + INTERVAL '1 hour', now() FROM beads WHERE id LIKE 'h%%'"
    )
    bead(work, "three")
    assert [claim_next(work), claim_next(work)] == ["three", None]


# One bead


def test_the_same_agent_again_has_the_same_claim(work: AppClient) -> None:
    bead(work, "x")
    first = ask(work, "x", lease_seconds=100).json
    again = ask(work, "x", lease_seconds=10).json
    assert (again["status"], again["fencing_token"]) == ("claimed", first["fencing_token"])
    assert again["lease_expires_at"] >= first["lease_expires_at"]
    assert again["bead"]["version"] == first["bead"]["version"]
    assert work.get("/api/v1/agents/a").json["current_bead"] == "x"


def test_another_agent_is_told_who_has_it_and_until_when(work: AppClient) -> None:
    bead(work, "x")
    ends = ask(work, "x").json["lease_expires_at"]
    problem = assert_problem(ask(work, "x", "b"), 409, "bead-claimed")
    assert problem["holder"] == {"agent_id": "a", "alive": True, "lease_expires_at": ends}
    assert "redispatch" in problem["detail"]


@pytest.mark.usefixtures("server_age")
def test_who_has_it_may_be_dead(work: AppClient, sql: Sql) -> None:
    """Nobody has noticed yet: every answer that names the holder says so."""
    bead(work, "x")
    bead(work, "reserved", assigned_to="b")
    lost = claim(work, "x")
    lapse(sql, "x")
    claim(work, "x", "b")
    for heard, alive in (("clock_timestamp()", True), ("clock_timestamp() - INTERVAL '121 seconds'", False)):
        sql(f"UPDATE agents SET heartbeat_at = {heard} WHERE id = 'b'")
        for answer in (
            ask(work, "reserved"),
            renew(work, "x", lost),
            work.post("/api/v1/file-locks", {"file_path": "f", "project_id": PROJECT, "agent_id": "a", "bead_id": "x"}),
        ):
            assert (answer.status, answer.json["holder"]["alive"]) == (409, alive), answer


def test_a_closed_bead_is_not_worked_on_again(work: AppClient) -> None:
    bead(work, "x")
    closed = complete(work, "x", claim(work, "x"), close_reason="done").json
    assert (closed["status"], closed["close_reason"]) == ("closed", "done")
    assert_problem(ask(work, "x", "b"), 409, "bead-closed", closed_at=closed["closed_at"])
    assert claim_next(work) is None


def test_an_agent_has_no_more_beads_than_it_may(work: AppClient, sql: Sql) -> None:
    configure(work, agents=AgentsConfig(max_concurrent=2))
    for key in ("x", "y", "z"):
        bead(work, key)
    claim(work, "x")
    claim(work, "y")
    for answer in (ask(work, "z"), work.post(f"{BEADS}/claim", {"agent_id": "a"})):
        assert_problem(answer, 409, "agent-busy", beads=["x", "y"])
    assert ask(work, "x").status == 200
    lapse(sql, "x")  # which nobody has noticed yet
    claim(work, "z")
    lapse(sql, "y")
    assert claim_next(work) in ("x", "y")
    assert_counted(sql)


def test_a_persons_work_is_left_alone(work: AppClient, sql: Sql) -> None:
    """in_progress without a claim: no lease, in no agent's count, given back by nobody."""
    bead(work, "x")
    patch(work, "x", status="in_progress", assigned_to="a")
    assert claim_next(work, "b") is None
    problem = assert_problem(ask(work, "x", "b"), 409, "bead-claimed")
    assert problem["holder"] == {"agent_id": "a", "alive": True, "lease_expires_at": None}
    assert sql("SELECT open_claims FROM agents WHERE id = 'a'") == [(0,)]
    claim(work, "x")  # its own agent may
    patch(work, "x", status="open")
    patch(work, "x", status="in_progress")
    assert_problem(ask(work, "x", "b"), 409, "bead-claimed")
    assert_counted(sql)


def test_an_old_client_claims_and_ignores_what_it_does_not_know(work: AppClient) -> None:
    bead(work, "x")
    answer = work.post(f"{BEADS}/x/claim", {"agent_id": "a", "agent_name": "?"})
    assert (answer.status, answer.json["status"], answer.json["bead"]["status"]) == (200, "claimed", "in_progress")


def test_ids_of_old_clients_hold_spaces_and_parentheses(work: AppClient, sql: Sql) -> None:
    agent, key = "agent-17-web (QA) ü", "bd 1 (ü)"
    make(work, "/api/v1/agents", id=agent, persona_name="x", project_id=PROJECT)
    bead(work, key)
    token = claim(work, key, agent)
    beaten = work.post(f"/api/v1/agents/{quote(agent)}/heartbeat", {"claims": {key: token}})
    assert list(beaten.json["extended"]) == [key]
    assert complete(work, quote(key), token).json["assigned_to"] == agent


# How a claim ends


def test_release_leaves_no_trace_of_who_had_it(work: AppClient, sql: Sql) -> None:
    bead(work, "x", assigned_to="a")
    token = claim(work, "x")
    assert work.delete(f"{BEADS}/x/claim?fencing_token={token}&reason=not+mine").status == 204
    assert sql("SELECT ended_how, reason FROM claims WHERE bead_id = 'x'") == [("released", "not mine")]
    changes = work.get(f"{BEADS}/x/history").json[0]["changes"]
    assert (changes["claim_ended"], changes["reason"]) == ("released", "not mine")
    found = get(work, "x")
    assert is_free(found)
    assert (found["attempts"], found["failures"]) == (0, 0)
    assert work.get("/api/v1/agents/a").json.get("current_bead") is None
    assert sql("SELECT open_claims FROM agents WHERE id = 'a'") == [(0,)]
    assert claim_next(work, "b") == "x"


def test_a_lapsed_bead_is_open_again_once_and_its_late_agent_refused(
    work: AppClient, sql: Sql, cleaner: Upkeep
) -> None:
    bead(work, "x")
    token = claim(work, "x")
    lapse(sql, "x")
    for answer in (renew(work, "x", token), complete(work, "x", token), fail(work, "x", token)):
        assert_lost(answer, "lapsed")
    cleaner.clean()
    cleaner.clean()
    found = get(work, "x")
    assert is_free(found)
    assert (found["attempts"], found["failures"]) == (1, 0)
    assert claim_next(work, "b") == "x"
    for answer in (
        renew(work, "x", token),
        complete(work, "x", token),
        fail(work, "x", token),
        release(work, "x", token),
    ):
        assert_lost(answer, "lapsed", "b")
    assert get(work, "x")["assigned_to"] == "b"
    assert_counted(sql)


@pytest.mark.parametrize("how", ["PATCH", "redispatch", "by hand"])
def test_a_lease_that_was_over_has_lapsed_whatever_ends_the_claim(work: AppClient, sql: Sql, how: str) -> None:
    for key in ("x", "y"):
        bead(work, key)
    lapsed, live = claim(work, "x"), claim(work, "y")
    lapse(sql, "x")
    if how == "by hand":
        sql("UPDATE beads SET status = 'open'")
    for key in ("x", "y"):
        if how == "PATCH":
            patch(work, key, status="open")
        elif how == "redispatch":
            assert work.post(f"{BEADS}/{key}/redispatch").status == 200
    assert [get(work, key)["attempts"] for key in ("x", "y")] == [1, 0]
    assert_lost(complete(work, "x", lapsed), "lapsed")
    assert_lost(complete(work, "y", live), "changed")
    assert_counted(sql)


def test_attempts_that_are_set_by_hand_stay(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    claim(work, "x")
    lapse(sql, "x")
    sql("UPDATE beads SET status = 'open', attempts = 7 WHERE id = 'x'")
    assert get(work, "x")["attempts"] == 7


def test_a_counter_that_was_set_by_hand_stops_nobody(work: AppClient, sql: Sql) -> None:
    for key in ("x", "y", "z"):
        bead(work, key)
    token = claim(work, "x")
    claim(work, "y")
    sql("UPDATE agents SET open_claims = 0")
    assert complete(work, "x", token).status == 200
    lapse(sql, "y")
    assert claim_next(work, "b") == "y"
    assert claim_next(work, "b") == "z"
    assert sql("SELECT id, open_claims FROM agents ORDER BY id") == [("a", 0), ("b", 2)]


def test_a_claim_does_not_wait_for_what_others_are_at(
    work: AppClient, sql: Sql, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    """Who waits with rows in hand deadlocks with who has them the other way round."""
    for key in ("of b", "slow", "free"):
        bead(work, key, priority=1 if key == "slow" else 2)
    claim(work, "of b", "b")
    lapse(sql, "of b")
    with session() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT FROM agents WHERE id = 'b' FOR UPDATE")
        cursor.execute("SELECT FROM beads WHERE id = 'slow' FOR UPDATE")
        assert [claim_next(work), claim_next(work)] == ["free", None]
    assert [claim_next(work), claim_next(work)] == ["slow", "of b"]


def test_a_claim_and_a_lapse_do_not_wait_for_a_write_that_a_file_lock_fences(
    work: AppClient, sql: Sql, cleaner: Upkeep, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    """The file lock ends with the claim, but nobody else gets the file before that write has ended."""
    bead(work, "x")
    claim(work, "x", "b")
    file = {"file_path": "a.py", "project_id": PROJECT}
    lock = make(work, "/api/v1/file-locks", **file, agent_id="b", bead_id="x")
    lapse(sql, "x")
    with session() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT loom_fence(%s, %s)", (lock["lock_name"], lock["fencing_token"]))
        started = time.monotonic()
        assert claim_next(work) == "x"
        assert time.monotonic() - started < 1
        assert work.get("/api/v1/file-locks").json == []
        assert work.post("/api/v1/file-locks", {**file, "agent_id": "a"}).status == 409
    assert work.post("/api/v1/file-locks", {**file, "agent_id": "a"}).status == 201


def test_a_lapsed_claim_whose_file_lock_is_locked_waits_for_it_and_no_other_does(
    work: AppClient, sql: Sql, cleaner: Upkeep, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    for key in ("x", "y"):
        bead(work, key)
        claim(work, key, "b")
        make(work, "/api/v1/file-locks", file_path=key, project_id=PROJECT, agent_id="b", bead_id=key)
        lapse(sql, key)
    with session() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT FROM distributed_locks WHERE metadata ->> 'bead_id' = 'x' FOR UPDATE")
        cleaner.clean()
        assert (get(work, "x")["status"], get(work, "y")["status"]) == ("in_progress", "open")
    cleaner.clean()
    assert get(work, "x")["status"] == "open"
    assert_counted(sql)


def test_a_lapsed_claim_that_cannot_be_ended_is_named_in_the_log_and_stops_no_other(
    work: AppClient, sql: Sql, cleaner: Upkeep, caplog: pytest.LogCaptureFixture
) -> None:
    for key in ("x", "y"):
        bead(work, key)
        claim(work, key, "b")
        lapse(sql, key)
    sql("UPDATE beads SET lease_expires_at = lease_expires_at - INTERVAL '2 minutes' WHERE id = 'x'")
    sql("INSERT INTO claims SELECT fencing_token, id, 'b', now(), now(), now(), 'lapsed' FROM beads WHERE id = 'x'")
    assert claim_next(work) == "y"
    cleaner.clean()
    (skipped,) = (record.fields for record in caplog.records if record.msg == "upkeep-skipped")
    assert skipped["part"] == "claims"
    assert "claims_pkey" in skipped["rows"]["x"]


def test_a_dead_agent_that_claims_and_a_heartbeat_that_names_the_bead_meet_no_deadlock(
    work: AppClient, sql: Sql, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    """A claim locks the bead before the row of its agent, as a heartbeat does."""
    bead(work, "x")
    sql("UPDATE agents SET status = 'dead' WHERE id = 'a'")
    with session() as heartbeat, heartbeat.cursor() as cursor, ThreadPoolExecutor() as threads:
        cursor.execute("SELECT FROM beads WHERE id = 'x' FOR NO KEY UPDATE")
        claiming = threads.submit(claim, work, "x")
        waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        wait_until(lambda: sql(waits) == [(1,)])
        cursor.execute("SELECT FROM agents WHERE id = 'a' FOR NO KEY UPDATE NOWAIT")
        heartbeat.commit()
        claiming.result()
    assert work.get("/api/v1/agents/a").json["status"] == "idle"


@pytest.mark.parametrize("which", ["x", None])
def test_a_lapsed_bead_needs_nobody_to_open_it(work: AppClient, sql: Sql, which: str | None) -> None:
    bead(work, "x")
    claim(work, "x")
    lapse(sql, "x")
    if which:
        claim(work, which, "b")
    else:
        assert claim_next(work, "b") == "x"
    assert (get(work, "x")["assigned_to"], get(work, "x")["attempts"]) == ("b", 1)
    assert_counted(sql)


def test_a_failed_bead_waits_longer_each_time(work: AppClient, sql: Sql) -> None:
    configure(work, beads=BeadsConfig(max_failures=100, max_attempts=100))
    bead(work, "x")
    waits = []
    for n in range(9):
        found = fail(work, "x", claim(work, "x"), reason="no").json
        assert (found["status"], found["attempts"], found["failures"]) == ("open", n + 1, n + 1)
        waits.append(round((instant(found["not_before"]) - instant(found["updated_at"])).total_seconds()))
        assert claim_next(work, "b") is None
        assert_problem(ask(work, "x", "b"), 409, "bead-blocked", not_before=found["not_before"])
        sql("UPDATE beads SET not_before = clock_timestamp()")
    assert waits == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert claim_next(work, "b") == "x"


@pytest.mark.parametrize("seconds", [0, 7])
def test_who_fails_says_when_to_try_again(work: AppClient, seconds: int) -> None:
    bead(work, "x")
    found = fail(work, "x", claim(work, "x"), retry_after_seconds=seconds).json
    if not seconds:
        assert is_free(found)
        assert claim_next(work, "b") == "x"
    else:
        assert instant(found["not_before"]) - instant(found["updated_at"]) == timedelta(seconds=seconds)


def test_what_fails_for_ever_is_given_to_nobody_and_says_why(work: AppClient, sql: Sql) -> None:
    configure(work, beads=BeadsConfig(max_failures=2, max_attempts=3))
    bead(work, "bad")
    bead(work, "deadly")
    for _ in range(2):
        found = fail(work, "bad", claim(work, "bad"), reason="no compiler", retry_after_seconds=0).json
    assert (found["status"], found["blocked_reason"]) == ("blocked", "failed 2 times, the last time: no compiler")
    for _ in range(3):
        claim(work, "deadly")
        lapse(sql, "deadly")
        claim_next(work, "b", types=["none"])
    found = get(work, "deadly")
    reason = "claimed 3 times without success, the last time: lapsed"
    assert (found["status"], found["attempts"], found["failures"], found["blocked_reason"]) == ("blocked", 3, 0, reason)
    assert claim_next(work) is None
    problem = assert_problem(ask(work, "deadly"), 409, "bead-blocked", blocked_reason=reason)
    assert "PATCH its status to open" in problem["detail"]
    patch(work, "deadly", status="open")
    assert claim_next(work) == "deadly"
    assert get(work, "deadly")["attempts"] == 0


def test_an_end_that_is_told_twice_is_one_end(work: AppClient, sql: Sql) -> None:
    for key in ("done", "failed", "released"):
        bead(work, key)
    done, failed, released = (claim(work, key) for key in ("done", "failed", "released"))
    for _ in range(2):
        assert complete(work, "done", done).status == 200
        assert fail(work, "failed", failed, retry_after_seconds=0).status == 200
        assert release(work, "released", released).status == 204
    assert get(work, "failed")["attempts"] == 1
    assert_lost(fail(work, "done", done), "completed")
    assert_lost(complete(work, "failed", failed), "failed")
    assert_lost(complete(work, "released", released), "released")
    claim(work, "failed", "b")
    assert fail(work, "failed", failed).json["assigned_to"] == "b"  # the bead as it is
    assert_counted(sql)


@pytest.mark.parametrize(
    ("change", "status", "assigned_to"),
    [
        ({"status": "open"}, "open", None),
        ({"status": "blocked"}, "blocked", None),
        ({"status": "closed"}, "closed", "a"),
        ({"assigned_to": "b"}, "open", "b"),
        ({"assigned_to": None}, "open", None),
        ({"status": "in_progress", "assigned_to": "b"}, "open", "b"),
        ({"status": "open", "assigned_to": "b"}, "open", "b"),
    ],
)
def test_a_change_of_status_or_assignee_ends_the_claim(
    work: AppClient, sql: Sql, change: dict[str, Any], status: str, assigned_to: str | None
) -> None:
    bead(work, "x")
    token = claim(work, "x")
    patch(work, "x", title="the claim stays")
    assert get(work, "x")["fencing_token"] == token
    found = patch(work, "x", **change)
    assert (found["status"], found.get("assigned_to")) == (status, assigned_to)
    assert "fencing_token" not in found
    assert "lease_expires_at" not in found
    assert_lost(complete(work, "x", token), "changed")
    assert sql("SELECT open_claims, current_bead FROM agents WHERE id = 'a'") == [(0, None)]
    assert_counted(sql)


def test_a_claim_ends_with_its_bead(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    token = claim(work, "x")
    assert work.delete(f"{BEADS}/x").status == 204
    for answer in (complete(work, "x", token), renew(work, "x", token), release(work, "x", token), ask(work, "x")):
        assert answer.json["detail"] == "Bead not found"
        assert_problem(answer, 404, "not-found")
    assert_counted(sql)


def test_a_renewal_gives_a_new_end_and_revives_nothing(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    token = claim(work, "x", lease_seconds=1000)
    short = renew(work, "x", token, lease_seconds=10).json
    assert (short["fencing_token"], short["bead"]["lease_seconds"]) == (token, 10)
    assert (
        timedelta(seconds=8) < instant(short["lease_expires_at"]) - datetime.now(timezone.utc) < timedelta(seconds=11)
    )
    assert renew(work, "x", token).json["bead"]["lease_seconds"] == 10
    lapse(sql, "x")
    assert_lost(renew(work, "x", token), "lapsed")
    assert_lost(renew(work, "x", 17), None)


def test_a_claim_whose_history_was_removed_is_not_said_never_to_have_existed(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    token = claim(work, "x")
    assert fail(work, "x", token).status == 200
    sql("DELETE FROM claims")
    problem = assert_problem(renew(work, "x", token), 409, "claim-lost", ended_how=None)
    assert problem["detail"] == "No such claim is known: it was never made, or its history was removed."


def test_a_redispatched_bead_is_taken_from_who_has_it(work: AppClient, sql: Sql) -> None:
    bead(work, "x", context={"k": "v"})
    token = claim(work, "x")
    found = work.post(f"{BEADS}/x/redispatch", {"reason": "stuck", "who": "?"}).json
    assert is_free(found)
    assert (found["context"]["redispatch_reason"], found["context"]["redispatch_requested"]) == ("stuck", "true")
    assert found["context"]["k"] == "v"
    assert abs(instant(found["context"]["redispatch_requested_at"]) - instant(found["updated_at"])) < timedelta(
        seconds=5
    )
    assert_lost(complete(work, "x", token), "changed")
    fail(work, "x", claim(work, "x"))
    assert claim_next(work) is None
    assert work.post(f"{BEADS}/x/redispatch").status == 200
    assert claim_next(work) == "x"


def test_what_was_found_out_is_kept(work: AppClient) -> None:
    bead(work, "x", context={"a": "1", "b": "2"})
    found = complete(work, "x", claim(work, "x"), context={"b": "3", "c": "4"}, close_reason="ok").json
    assert found["context"] == {"a": "1", "b": "3", "c": "4"}


@pytest.mark.parametrize(
    "adopt",
    [
        lambda work, sql: bead(work, "new", parent="x"),
        lambda work, sql: make_bulk(work, id="new", parent="x"),
        lambda work, sql: patch(work, "done", status="open"),
        lambda work, sql: patch(work, "other", parent="x"),
        lambda work, sql: patch(work, "x", children=["other", "done"]),
        lambda work, sql: sql("INSERT INTO beads (id, title, project_id, parent) VALUES ('new', 't', 'p', 'x')"),
        lambda work, sql: sql("UPDATE beads SET parent = 'x' WHERE id = 'other'"),
    ],
    ids=["created", "bulk", "reopened", "moved", "children", "created by hand", "moved by hand"],
)
def test_a_claim_completes_no_parent_over_its_open_children(
    work: AppClient, sql: Sql, adopt: Callable[[AppClient, Sql], Any]
) -> None:
    for key in ("x", "other"):
        bead(work, key)
    bead(work, "done", parent="x", status="closed")
    token = claim(work, "x")
    adopt(work, sql)
    ((child,),) = sql("SELECT id FROM beads WHERE parent = 'x' AND status <> 'closed'")
    before = sql("SELECT to_jsonb(b), (SELECT count(*) FROM events) FROM beads b WHERE id = 'x'")
    for _ in range(2):
        answer = complete(work, "x", token, context={"a": "1"}, headers={"Idempotency-Key": "k"})
        problem = assert_problem(answer, 409, "open-children", bead_id="x", children=[child])
        assert "The claim is still valid" in problem["detail"]
    assert sql("SELECT to_jsonb(b), (SELECT count(*) FROM events) FROM beads b WHERE id = 'x'") == before
    assert renew(work, "x", token).status == 200
    patch(work, child, status="closed")
    assert complete(work, "x", token, headers={"Idempotency-Key": "k2"}).status == 200
    patch(work, child, status="open")
    assert complete(work, "x", token).json["status"] == "closed", "repeated: it had been completed"
    assert_counted(sql)


@pytest.mark.parametrize("end", [fail, release])
def test_a_parent_of_open_children_can_be_given_back_and_waits_for_them(
    work: AppClient, sql: Sql, end: Callable[..., Any]
) -> None:
    bead(work, "x")
    token = claim(work, "x")
    bead(work, "child", parent="x", assigned_to="b")
    assert end(work, "x", token).status in (200, 204)
    assert_problem(ask(work, "x"), 409, "bead-blocked", children=["child"])
    assert_lost(complete(work, "x", token), "failed" if end is fail else "released")
    assert_counted(sql)


def test_a_person_may_close_a_claimed_parent_over_its_open_children(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    token = claim(work, "x")
    bead(work, "child", parent="x")
    assert patch(work, "x", status="closed")["status"] == "closed"
    assert_lost(complete(work, "x", token), "changed")
    assert_counted(sql)


def test_a_blocker_that_is_added_to_a_claimed_bead_does_not_keep_it_open(work: AppClient, sql: Sql) -> None:
    """blocked_by says when work may begin; this work was begun."""
    for key in ("x", "blocker"):
        bead(work, key)
    token = claim(work, "x")
    patch(work, "x", blocked_by=["blocker"])
    assert complete(work, "x", token).json["status"] == "closed"
    assert_counted(sql)


# Locks from outside, retries


def test_a_bead_that_is_locked_from_outside_changes_only_for_who_presents_the_lock(
    work: AppClient, sql: Sql, cleaner: Upkeep
) -> None:
    bead(work, "x")
    bead(work, "y")
    token, other = claim(work, "x"), claim(work, "y")
    held = acquire(work, "bead:x", owner="operator")["fencing_token"]
    for answer in (complete(work, "x", token), fail(work, "x", token), release(work, "x", token), ask(work, "x", "b")):
        problem = assert_problem(answer, 409, "lock-held", lock_name="bead:x")
        assert problem["holder"]["owner"] == "operator"
        assert answer.headers["Retry-After"] == "1"
    assert renew(work, "x", token, lease_seconds=10).status == 200  # the holder must not let the claim lapse
    lapse(sql, "x")
    cleaner.clean()
    assert claim_next(work, "b") is None
    assert get(work, "x")["fencing_token"] == token
    mine = {"Loom-Lock-Token": str(held)}
    assert ask(work, "x", "b", headers=mine).json["bead"]["attempts"] == 1
    named = {"Loom-Lock-Token": f'{held}; lock="bead%3Ax"'}
    assert complete(work, "y", other, headers=named).status == 200
    assert force(work, held, "bead:x").status == 204
    for headers in (mine, named):
        for answer in (
            ask(work, "x", "b", headers=headers),
            work.put(f"{BEADS}/x/claim", {"fencing_token": token}, headers=headers),
            work.post("/api/v1/agents/a/heartbeat", headers={"Loom-Lock-Token": named["Loom-Lock-Token"]}),
        ):
            assert_problem(answer, 409, "lock-lost", lock_name="bead:x", fencing_token=held)


def test_the_token_of_the_agents_own_lock_does_for_a_retry_of_its_claim(work: AppClient) -> None:
    bead(work, "x")
    headers = {"Loom-Lock-Token": str(acquire(work, "agent:a")["fencing_token"]), "Idempotency-Key": "k"}
    first, again = (work.post(f"{BEADS}/claim", {"agent_id": "a"}, headers=headers) for _ in range(2))
    assert (first.status, again.status) == (200, 200)
    assert again.json["fencing_token"] == first.json["fencing_token"]


def test_beads_that_cannot_be_reopened_are_tried_once_in_a_round_of_upkeep(
    work: AppClient, sql: Sql, cleaner: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "BATCH", 10)  # a tenth of it is a batch of claims
    passes: list[list[dict[str, Any]]] = []
    real_lapse = claims.lapse

    def lapse_and_count(conn: Connection, writer: Writer, most: int) -> list[dict[str, Any]]:
        passes.append(real_lapse(conn, writer, most))
        return passes[-1]

    monkeypatch.setattr(claims, "lapse", lapse_and_count)
    for key in ("held", "x", "y"):
        bead(work, key)
        claim(work, key)
    acquire(work, "bead:held", owner="operator")
    lapse(sql, "held")
    cleaner.clean()
    assert len(passes) == 1
    lapse(sql, "x", "y")
    cleaner.clean()
    assert [get(work, key)["status"] for key in ("held", "x", "y")] == ["in_progress", "open", "open"]
    assert len(passes) == 1 + 3  # one for each bead that was reopened, and one that reopened none


def test_a_bead_that_is_locked_from_outside_is_passed_over_and_not_counted(work: AppClient, sql: Sql) -> None:
    bead(work, "held", priority=0)
    bead(work, "free")
    held = acquire(work, "bead:held", owner="operator")["fencing_token"]
    assert [claim_next(work), claim_next(work)] == ["free", None]
    assert work.get("/api/v1/agents/a").json["current_bead"] == "free"
    assert_counted(sql)
    assert force(work, held, "bead:held").status == 204
    assert claim_next(work) == "held"


def test_an_agent_that_is_locked_from_outside_gets_no_more_work(work: AppClient) -> None:
    bead(work, "x")
    held = acquire(work, "agent:a", owner="operator")["fencing_token"]
    mine = {"Loom-Lock-Token": f'{held}; lock="agent:a"'}
    for answer in (ask(work, "x"), work.post(f"{BEADS}/claim", {"agent_id": "a"})):
        assert_problem(answer, 409, "lock-held", lock_name="agent:a")
    assert work.post("/api/v1/agents/a/heartbeat").status == 200
    assert ask(work, "x", headers=mine).status == 200
    answer = work.post(f"{BEADS}/claim", {"agent_id": "a"})  # nothing is ready, but it is told why
    assert_problem(answer, 409, "lock-held", lock_name="agent:a")


@pytest.mark.parametrize("path", [f"{BEADS}/claim", f"{BEADS}/x/claim"])
def test_a_repeated_claim_is_the_first_one_or_lost(work: AppClient, sql: Sql, path: str) -> None:
    bead(work, "x")
    bead(work, "y", priority=3)

    def once() -> Any:
        return work.post(path, {"agent_id": "a", "lease_seconds": 60}, headers={"Idempotency-Key": "k"})

    first, again = once().json, once().json
    assert (again["bead"]["id"], again["fencing_token"]) == ("x", first["fencing_token"])
    assert again["lease_expires_at"] > first["lease_expires_at"]
    assert sql("SELECT open_claims FROM agents WHERE id = 'a'") == [(1,)]
    renew(work, "x", first["fencing_token"], lease_seconds=1000)
    assert instant(once().json["lease_expires_at"]) > datetime.now(timezone.utc) + timedelta(seconds=900)
    lapse(sql, "x")
    assert_lost(once(), "lapsed")
    claim(work, "x", "b")
    assert_lost(once(), "lapsed", "b")


def test_who_claimed_and_finished_stands_in_the_events(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    token = work.post(f"{BEADS}/x/claim", {"agent_id": "a"}, headers={"X-Request-ID": "r-1"}).json["fencing_token"]
    body = {"fencing_token": token}
    work.post(f"{BEADS}/x/complete", body, headers={"X-Request-ID": "r-2"})
    assert sql(
        "SELECT type, version, actor, request_id, project_id, instance_id IS NOT NULL FROM events"
        " WHERE entity_id = 'x' AND version > 1 ORDER BY place"
    ) == [("bead.assigned", 2, "a", "r-1", PROJECT, True), ("bead.completed", 3, "a", "r-2", PROJECT, True)]
    assert sql("SELECT agent_id, ended_how FROM claims WHERE fencing_token = %s", token) == [("a", "completed")]


# What it costs, and what is refused


def test_a_claim_costs_one_round_trip(work: AppClient, monkeypatch: pytest.MonkeyPatch) -> None:
    bead(work, "x")
    bead(work, "y")
    sent: list[str] = []
    execute = Connection._execute
    monkeypatch.setattr(Connection, "_execute", lambda self, sql, *more: sent.append(sql) or execute(self, sql, *more))

    def trips(call: Any) -> int:
        sent.clear()
        assert call().status in (200, 204)
        return len([sql for sql in sent if "heartbeat_instance" not in sql])

    token = ask(work, "x").json["fencing_token"]
    assert [
        trips(lambda: work.post(f"{BEADS}/claim", {"agent_id": "a"})),
        trips(lambda: ask(work, "x")),
        trips(lambda: renew(work, "x", token)),
        trips(lambda: work.post("/api/v1/agents/a/heartbeat", {"claims": {"x": token}})),
        trips(lambda: complete(work, "x", token)),
        trips(lambda: work.post(f"{BEADS}/claim", {"agent_id": "b"})),
    ] == [1] * 6


BAD = [
    ("POST", "/claim", {}, "agent_id"),
    ("POST", "/claim", {"agent_id": "nobody"}, "agent_id"),
    ("POST", "/claim", {"agent_id": ""}, "agent_id"),
    ("POST", "/claim", {"agent_id": "a/b"}, "agent_id"),
    ("POST", "/claim", {"agent_id": "a", "lease_seconds": 9}, "lease_seconds"),
    ("POST", "/claim", {"agent_id": "a", "lease_seconds": 86401}, "lease_seconds"),
    ("POST", "/claim", {"agent_id": "a", "lease_seconds": 10.0}, "lease_seconds"),
    ("POST", "/claim", {"agent_id": "a", "types": "task"}, "types"),
    ("POST", "/claim", {"agent_id": "a", "tags": [1]}, "tags[0]"),
    ("POST", "/claim", {"agent_id": "a", "projects": []}, "projects"),
    ("POST", "/x/claim", {}, "agent_id"),
    ("POST", "/x/claim", {"agent_id": "nobody"}, "agent_id"),
    ("POST", "/x/claim", {"agent_id": "a", "lease_seconds": "10"}, "lease_seconds"),
    ("PUT", "/x/claim", {}, "fencing_token"),
    ("PUT", "/x/claim", {"fencing_token": 0}, "fencing_token"),
    ("PUT", "/x/claim", {"fencing_token": 2**53}, "fencing_token"),
    ("PUT", "/x/claim", {"fencing_token": 1, "lease": 10}, "lease"),
    ("DELETE", "/x/claim", None, "fencing_token"),
    ("DELETE", "/x/claim?fencing_token=x", None, "fencing_token"),
    ("POST", "/x/complete", {"fencing_token": 1, "context": []}, "context"),
    ("POST", "/x/complete", {"fencing_token": 1, "reason": "x"}, "reason"),
    ("POST", "/x/complete", {"fencing_token": 1, "close_reason": "a\u0000"}, "close_reason"),
    ("POST", "/x/fail", {"fencing_token": 1, "retry_after_seconds": -1}, "retry_after_seconds"),
    ("POST", "/x/fail", {"fencing_token": 1, "retry_after_seconds": 86401}, "retry_after_seconds"),
    ("POST", "/x/redispatch", {"reason": 1}, "reason"),
    ("POST", "/%FF/claim", {"agent_id": "a"}, "id"),
    ("POST", "/%00/claim", {"agent_id": "a"}, "id"),
]


@pytest.mark.parametrize(("method", "path", "body", "field"), BAD)
def test_bad_input_is_named_and_changes_nothing(work: AppClient, method: str, path: str, body: Any, field: str) -> None:
    bead(work, "x")
    problem = assert_problem(work.request(method, BEADS + path, body), 400, "invalid")
    assert problem["errors"][0]["field"] == field
    assert get(work, "x")["version"] == 1


@pytest.mark.parametrize("path", ["claim", "complete", "fail", "redispatch"])
def test_a_bead_that_is_not_there_is_404(work: AppClient, path: str) -> None:
    body = {"agent_id": "a"} if path == "claim" else {"fencing_token": 1}
    assert work.post(f"{BEADS}/none/{path}", body).json["error"] == "Bead not found"
    assert_problem(renew(work, "none", 1), 404, "not-found")
    assert_problem(release(work, "none", 1), 404, "not-found")


def test_old_claims_are_forgotten_after_their_time(work: AppClient, sql: Sql, cleaner: Upkeep) -> None:
    for key in ("x", "y"):
        bead(work, key)
        complete(work, key, claim(work, key))
    sql("UPDATE claims SET ended_at = clock_timestamp() - INTERVAL '8 days' WHERE bead_id = 'x'")
    cleaner.clean()
    assert sql("SELECT bead_id FROM claims") == [("y",)]


def test_an_operator_cannot_leave_half_a_claim_behind(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    claim(work, "x")
    with pytest.raises(Exception, match="half a claim"):
        sql("UPDATE beads SET fencing_token = NULL")
    sql("UPDATE beads SET status = 'open'")
    assert is_free(get(work, "x"))
    claim(work, "x")
    sql("DELETE FROM beads")
    assert_counted(sql)
