"""An operator sees at /metrics what the cluster has and what happened to it, also while the database is away."""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from harness import AppClient, Postgres, wait_until
from harness.locks import BUILD, LOCKS, Sql, acquire, release, wait_expired
from harness.metrics import MONITORING, families, promtool, value
from harness.work import bead, claim, claim_next, complete, fail, team

from loom import __version__, db, instances
from loom.config import Config, resource
from loom.http.metrics import METHODS, UNMATCHED
from loom.instances import Instance
from loom.log_writer import OutputHandler
from loom.metrics import CLAIM_OUTCOMES, EVENTS, OTHER
from loom.routes import metrics as routes
from loom.state import request_rows
from loom.state.request_rows import RequestRows
from loom.upkeep import Upkeep

Value = Callable[..., float | None]


@pytest.fixture
def read(client: AppClient, monkeypatch: pytest.MonkeyPatch) -> Value:
    """The value of a metric now: the totals of the cluster are not kept."""
    monkeypatch.setattr(routes, "KEPT", 0.0)
    return lambda name, **labels: value(client, name, **labels)


@pytest.fixture
def event(read: Value) -> Callable[[str], float]:
    """How often an event has happened since the beginning of the test."""
    before = {name: read("loom_failover_events_total", event=name) or 0 for name in EVENTS}
    return lambda name: (read("loom_failover_events_total", event=name) or 0) - before[name]


def test_promtool_finds_no_fault(client: AppClient) -> None:
    acquire(client)
    client.get("/unknown")
    assert promtool("check", "metrics", text=client.get("/metrics").body) == ""


def test_every_sample_names_its_instance(client: AppClient, instance: Instance) -> None:
    found = families(client)
    samples = [sample for family in found.values() for sample in family.samples]
    assert {sample.labels["instance_id"] for sample in samples} == {instance.instance_id}
    assert found["loom_build_info"].samples[0].labels["version"] == __version__
    assert found["process_resident_memory_bytes"].samples[0].value > 1e6
    assert all(family.documentation for family in found.values())


def test_each_metric_is_documented_and_no_alert_asks_for_another(client: AppClient) -> None:
    acquire(client)
    found = set(families(client))
    ours = {name for name in found if name.startswith("loom_")}
    documented = re.findall(r"`(loom_\w+?)(?:_total)?(?:\{[\w,]+\})?`", resource("docs/monitoring.md").read_text())
    assert set(documented) == ours
    asked = re.findall(r"\b(loom_\w+?)(?:_total)?\b", (MONITORING / "loom.rules.yml").read_text())
    assert set(asked) <= ours
    events = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", resource("docs/monitoring.md").read_text(), re.MULTILINE)
    assert set(EVENTS) <= set(re.findall(r"\w+", " ".join(events)))


def test_active_and_dead_instances_are_counted(
    read: Value, event: Callable[[str], float], database: db.Database, sql: Sql
) -> None:
    assert (read("loom_active_instances"), read("loom_dead_instances")) == (1, 0)
    number = str(uuid.uuid4())
    sql("SELECT register_instance(%s, 'elsewhere', '{}')", number)
    assert read("loom_active_instances") == 2
    with database.connection() as conn:
        instances.mark_dead(conn, number)
    assert (read("loom_active_instances"), read("loom_dead_instances")) == (1, 1)
    assert (event("instance_died"), event("instance_died")) == (1, 1), "each death is counted once"


def test_an_instance_that_gets_a_new_identity_is_counted(
    event: Callable[[str], float], instance: Instance, sql: Sql
) -> None:
    sql("DELETE FROM instances")
    instance.beat()
    assert event("instance_replaced") == 1


def test_a_late_heartbeat_is_counted(
    read: Value, event: Callable[[str], float], instance: Instance, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 <= (read("loom_heartbeat_age_seconds") or 0) < 30
    instance.beat()
    assert event("heartbeat_late") == 0
    monkeypatch.setattr(instances, "LATE", 0.0)
    instance.beat()
    assert event("heartbeat_late") == 1


def test_the_pool_of_connections_and_the_waits_for_it_are_shown(read: Value, database: db.Database) -> None:
    waits = read("loom_db_connection_wait_seconds_count") or 0
    held = [database.connection() for _ in range(10)]
    for connection in held:
        connection.__enter__()
    assert read("loom_db_connections_max") == read("loom_db_connections", state="in_use") == 10
    assert read("loom_db_connections", state="idle") == 0

    def wait() -> None:
        database.start_request()
        with database.connection():
            pass

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: read("loom_db_connections_waiting") == 1)
    assert read("loom_active_instances") == 1, "the totals do not wait for the pool"
    for connection in held:
        connection.__exit__(None, None, None)
    thread.join()
    assert read("loom_db_connections_waiting") == 0
    assert (read("loom_db_connection_wait_seconds_count") or 0) > waits


def test_the_time_to_acquire_a_lock_is_counted_by_outcome(client: AppClient, read: Value) -> None:
    def counted() -> list[float]:
        name, outcomes = "loom_lock_acquire_seconds_count", ("acquired", "extended", "refused", "error")
        return [read(name, outcome=outcome) or 0 for outcome in outcomes]

    before = counted()
    token = acquire(client, owner="a")["fencing_token"]
    acquire(client, owner="a")
    client.post(BUILD, {"owner": "b"})
    client.post(BUILD, {"ttl_seconds": 0})
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 1, 1, 1]
    assert (read("loom_locks_held"), read("loom_lock_waiters")) == (1, 0)
    client.post(BUILD, {"owner": "b", "wait_seconds": 1})
    assert read("loom_lock_waiters") == 1
    release(client, token)
    assert read("loom_locks_held") == 0


def test_a_lock_that_expired_is_counted_when_another_takes_it_or_it_is_cleaned_up(
    client: AppClient, event: Callable[[str], float], instance: Instance, sql: Sql
) -> None:
    acquire(client, owner="a", ttl_seconds=1)
    wait_expired(sql)
    acquire(client, owner="b", ttl_seconds=1)
    assert (event("lock_taken_over"), event("lock_expired")) == (1, 0)
    wait_expired(sql)
    Upkeep(Config(), instance).clean()
    assert (event("lock_taken_over"), event("lock_expired")) == (1, 1)
    release(client, acquire(client)["fencing_token"])
    assert (event("lock_taken_over"), event("lock_expired")) == (1, 1), "an orderly release is no event"


def test_beads_are_counted_by_status_and_whether_they_are_ready(client: AppClient, read: Value) -> None:
    team(client, "a")
    for key in ("ready", "claimed", "stopped"):
        bead(client, key)
    bead(client, "waits", blocked_by=["ready"])
    claim(client, "claimed")
    client.request("PATCH", "/api/v1/beads/stopped", {"status": "blocked"})
    by_status = [read("loom_beads", status=status) for status in ("open", "in_progress", "blocked")]
    assert (by_status, read("loom_beads_ready")) == ([2, 1, 1], 1)


def test_claims_are_counted_by_outcome(client: AppClient, read: Value) -> None:
    before = {outcome: read("loom_claims_total", outcome=outcome) for outcome in (*CLAIM_OUTCOMES, OTHER)}
    team(client, "a", "b")
    assert claim_next(client) is None
    for key in ("x", "y"):
        bead(client, key)
    token = claim(client, "x")
    assert claim(client, "x") == token
    assert client.post("/api/v1/beads/x/claim", {"agent_id": "b"}).status == 409
    assert client.put("/api/v1/beads/x/claim", {"fencing_token": token}).status == 200
    assert [complete(client, "x", token).status for _ in range(2)] == [200, 200]
    assert fail(client, "y", claim(client, "y")).status == 200
    acquire(client, "bead:y")
    assert client.post("/api/v1/beads/y/claim", {"agent_id": "a"}).status == 409
    counted = {
        outcome: (read("loom_claims_total", outcome=outcome) or 0) - (was or 0) for outcome, was in before.items()
    }
    expected = {"nothing": 1, "claimed": 2, "same": 1, "bead-claimed": 1, "renewed": 1, "completed": 1, "repeated": 1}
    assert {outcome: n for outcome, n in counted.items() if n} == {**expected, "failed": 1, "lock-held": 1}


@pytest.mark.parametrize("who", ["upkeep", "a claim"])
def test_a_bead_that_is_given_back_is_counted_once(
    client: AppClient, event: Callable[[str], float], instance: Instance, sql: Sql, who: str
) -> None:
    team(client, "a", "b")
    bead(client, "x")
    claim(client, "x")
    sql("UPDATE beads SET lease_expires_at = clock_timestamp() - INTERVAL '1 second'")
    assert event("bead_given_back") == 0
    if who == "a claim":
        assert claim_next(client, "b") == "x"
    Upkeep(Config(), instance).clean()
    assert event("bead_given_back") == 1


def test_event_lag_is_the_age_of_the_oldest_event_outside_the_feed(client: AppClient, read: Value) -> None:
    assert read("loom_event_lag_seconds") == 0
    team(client)
    wait_until(lambda: (read("loom_event_lag_seconds") or 0) > 0.05)
    client.get("/api/v1/events?after=0")
    assert read("loom_event_lag_seconds") == 0


def test_requests_are_counted_by_route_method_and_status_never_by_what_clients_send(
    client: AppClient, read: Value
) -> None:
    def count(route: str, method: str, status: int) -> float:
        return read("loom_http_requests_total", route=route, method=method, status=str(status)) or 0

    template = LOCKS + "{name}"
    before = count(template, "GET", 404), count(UNMATCHED, "GET", 404), count(UNMATCHED, OTHER, 405)
    for number in range(20):
        assert client.get(f"{LOCKS}{uuid.uuid4()}").status == 404
        assert client.get(f"/{uuid.uuid4()}").status == 404
        assert client.request(f"METHOD{number}", "/health").status == 405
    after = count(template, "GET", 404), count(UNMATCHED, "GET", 404), count(UNMATCHED, OTHER, 405)
    assert [now - then for now, then in zip(after, before, strict=True)] == [20, 20, 20]
    assert (read("loom_http_request_seconds_count", route=template) or 0) >= 20


def test_lines_and_rows_that_wait_or_are_lost_are_counted_by_target(
    client: AppClient, read: Value, database: db.Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [OutputHandler(str(tmp_path / "log"))])
    logging.getLogger().handlers[0].name = "output"
    monkeypatch.setattr(request_rows, "current", RequestRows(database, Config))
    monkeypatch.setattr(request_rows, "MOST_ROWS", 2)
    for _ in range(5):
        client.get("/api/v1/locks")
    assert (read("loom_log_queued", target="request_logs"), read("loom_log_queued", target="output")) == (2, 0)
    assert read("loom_log_dropped_total", target="request_logs") == 3


def test_labels_have_few_values_whatever_clients_send(client: AppClient, app: Flask) -> None:
    of_other_tests = {sample.labels["route"] for sample in families(client)["loom_http_requests"].samples}
    for number in range(30):
        for method in ("GET", "POST", f"M{number}", "\u00e9"):
            for path in (f"/api/v1/beads/{number}/x?{number}=1", f"/api/v1/beads/{number}", f"{LOCKS}%00{number}"):
                client.request(method, path)
    routes = {re.sub("<[^>]*>", "{}", rule.rule) for rule in app.url_map.iter_rules()} | {UNMATCHED}
    for sample in families(client)["loom_http_requests"].samples:
        route = sample.labels["route"]
        assert route in of_other_tests or re.sub("{[^}]*}", "{}", route) in routes
        assert sample.labels["method"] in {*METHODS, OTHER}
        assert 200 <= int(sample.labels["status"]) < 600


def test_totals_are_counted_once_in_a_while(client: AppClient, sql: Sql) -> None:
    assert value(client, "loom_locks_held") == 0
    acquire(client)
    assert value(client, "loom_locks_held") == 0, "kept for some seconds"


def test_a_locked_table_delays_scrapes_by_a_bound(read: Value, session: Callable[[], Any]) -> None:
    with session() as conn, conn.cursor() as cursor, ThreadPoolExecutor(8) as threads:
        cursor.execute("LOCK beads IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        found = threads.map(read, ["loom_active_instances", "loom_database_up"] * 4)
        assert list(found) == [None, 1] * 4
        assert time.monotonic() - started < 2 * routes.SECONDS + 2


class TestOutage:
    @pytest.fixture
    def postgres(self, own_postgres: Postgres) -> Postgres:
        """A server of the test's own, which it may stop."""
        return own_postgres

    def test_it_answers_while_the_database_is_away_and_counts_the_outage(
        self, read: Value, event: Callable[[str], float], postgres: Postgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(routes, "KEPT", 3600.0)
        assert (read("loom_database_up"), read("loom_active_instances")) == (1, 1)
        postgres.stop()
        wait_until(lambda: read("loom_database_up") == 0)
        started = time.monotonic()
        assert (event("database_lost"), event("database_regained")) == (1, 0)
        assert read("loom_active_instances") is None, "an old number would look like a new one"
        assert time.monotonic() - started < 2
        postgres.start()
        wait_until(lambda: read("loom_database_up") == 1)
        assert (event("database_lost"), event("database_regained")) == (1, 1)
        wait_until(lambda: read("loom_active_instances") == 1)
