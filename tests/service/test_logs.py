"""What every instance was asked, and what the models of agents cost, is found in one place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.locks import Sql, assert_problem

from loom import db, instances
from loom.config import Config, LoggingConfig
from loom.state import logs, request_rows
from loom.state.request_rows import RequestRows
from loom.upkeep import Upkeep

LOGS = "/api/v1/logs"
USAGE = {"provider_id": "p-1", "model_name": "m", "user_id": "ann", "prompt_tokens": 100, "completion_tokens": 20,
         "cost_usd": 0.1, "latency_ms": 12.5, "status_code": 200}  # fmt: skip


@pytest.fixture
def rows(database: db.Database, instance: instances.Instance) -> Iterator[RequestRows]:
    """The rows of this process; a test writes them itself, instead of the thread."""
    request_rows.current = RequestRows(database, Config)
    yield request_rows.current
    request_rows.current = None


def test_a_request_is_a_row_that_tells_what_it_was(client: AppClient, rows: RequestRows) -> None:
    client.post("/api/v1/locks/a%20b", {"owner": "me"}, headers={"X-Request-ID": "r-1"})
    client.get("/api/v1/beads/none")
    client.get("/nowhere")
    for quiet in ("/health", "/metrics"):
        client.get(quiet)
    before = time.time()
    rows.write()
    nowhere, bead, lock = client.get(LOGS).json
    assert lock.pop("latency_ms") >= lock.pop("database_ms") > 0
    assert lock.pop("timestamp")
    assert lock.pop("id")
    assert lock == {
        "source": "request",
        "level": "info",
        "request_id": "r-1",
        "instance_id": instances.own_id(),
        "user_id": "",
        "method": "POST",
        "route": "/api/v1/locks/{name}",
        "path": "/api/v1/locks/a b",
        "status_code": 201,
        "lock_name": "a b",
        "bead_id": None,
        "agent_id": None,
        "project_id": None,
        "provider_id": "",
        "model_name": "",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "total_tokens": 0,
        "cost_usd": 0,
        "error_message": None,
        "metadata": None,
    }
    assert (bead["bead_id"], bead["level"], bead["status_code"]) == ("none", "warn", 404)
    assert (nowhere["route"], nowhere["path"]) == (None, "/nowhere")
    assert rows.usage() == {"queued": 1, "dropped": 0}, "the list itself"
    assert time.time() - before < 5


def test_any_path_is_stored_and_no_secret(client: AppClient, rows: RequestRows) -> None:
    paths = [
        '/"a", \\. b',
        "/a\r\nb\n\\.\nc",
        "/nul\0",
        "/\ud83d\ude00é".encode("utf-16", "surrogatepass").decode("utf-16"),
    ]
    for path in paths:
        client.get("/" + "".join(f"%{byte:02x}" for byte in path[1:].encode()))
    rows.write()
    client.get("/postgresql:%2F%2Fu:hunter22@h/d?password=hunter22")
    rows.write()
    secret, *stored = [row["path"] for row in client.get(LOGS).json]
    assert stored[::-1] == [path.replace("\0", "\ufffd") for path in paths]
    assert "hunter22" not in secret
    assert rows.usage()["dropped"] == 0


@pytest.mark.parametrize(("requests", "statuses"), [("all", [201, 404]), ("errors", [404]), ("off", [])])
def test_the_setting_chooses_the_requests(
    app: Any, config: Config, rows: RequestRows, requests: str, statuses: list[int]
) -> None:
    client = AppClient(app)
    app.config["LOOM"] = Config(config.database, config.server, logging=LoggingConfig(requests=requests))
    client.get("/api/v1/locks/x")
    client.post("/api/v1/locks/x", {})
    rows.write()
    assert [row["status_code"] for row in client.get(LOGS).json] == statuses


def test_pages_filters_and_times_find_every_row_once(
    client: AppClient, rows: RequestRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(30):
        client.get(f"/api/v1/beads/b-{i % 3}")
        client.post(LOGS, {**USAGE, "model_name": f"m-{i % 2}", "project_id": "shop"})
    rows.write()
    everything = client.get(LOGS).json
    assert len(everything) == 90, "each report is also a request"
    assert [row["timestamp"] for row in everything] == sorted((row["timestamp"] for row in everything), reverse=True)

    def follow(query: str) -> list[dict[str, Any]]:
        found, path = [], f"{LOGS}?{query}"
        while path:
            answer = client.get(path)
            found += answer.json
            path = answer.headers.get("Link", "").partition("<")[2].partition(">")[0]
        return found

    monkeypatch.setattr(logs, "SCAN", 7)
    wanted = {
        "limit=8": lambda row: True,
        "limit=4&bead_id=b-1": lambda row: row["bead_id"] == "b-1",
        "level=warn": lambda row: row["status_code"] == 404,
        "source=usage&limit=20": lambda row: row["provider_id"] == "p-1",
        "model_name=m-1&project_id=shop&limit=3": lambda row: row["model_name"] == "m-1",
        "status_code=201&method=POST": lambda row: row["method"] == "POST",
        "bead_id=other": lambda row: False,
    }
    for query, fits in wanted.items():
        assert follow(query) == [row for row in everything if fits(row)], query
    nothing = client.get(f"{LOGS}?bead_id=other")
    assert (nothing.json, "Link" in nothing.headers) == ([], True), "it has looked at seven rows"
    middle = everything[40]["timestamp"]
    newer, older = follow(f"since={middle}&limit=9"), follow(f"until={middle}&limit=9")
    assert (newer + older, len(newer)) == (everything, 41)
    for query in ("since=yesterday", "since=2026-11-30", "level=debug", "source=x", "after=x", "colour=red"):
        assert_problem(client.get(f"{LOGS}?{query}"), 400, "invalid")


def test_recent_rows_read_like_a_log(client: AppClient, rows: RequestRows) -> None:
    client.get("/api/v1/beads/b-1", headers={"X-Request-ID": "r-1"})
    client.post(LOGS, {**USAGE, "error_message": "overloaded", "bead_id": "b-1", "metadata": {"try": "2"}})
    rows.write()
    found = client.get(f"{LOGS}/recent?bead_id=b-1").json
    usage, request = found["logs"]
    assert found["count"] == 2
    assert (usage["level"], usage["source"], usage["message"]) == ("error", "usage", "p-1 m 200: overloaded")
    assert (usage["metadata"]["try"], usage["metadata"]["bead_id"]) == ("2", "b-1")
    assert (request["level"], request["source"], request["message"]) == ("warn", "request", "GET /api/v1/beads/b-1 404")
    assert request["metadata"]["request_id"] == "r-1"
    assert [line["level"] for line in client.get(f"{LOGS}/recent?level=error").json["logs"]] == ["error"]
    assert client.get(f"{LOGS}/recent?limit=1&since=2020-01-01T00:00:00Z").json["count"] == 1
    assert_problem(client.get(f"{LOGS}/recent?since=never"), 400, "invalid")


def test_a_reported_use_is_stored_when_it_is_acknowledged_and_once_for_each_key(client: AppClient, sql: Sql) -> None:
    body = {**USAGE, "project_id": "shop", "agent_id": "a-1", "error_message": None, "metadata": {"a": "b"}}
    answer = client.post(LOGS, body, headers={"Idempotency-Key": "k", "X-Request-ID": "r-1"})
    assert answer.status == 201
    told = answer.json
    assert {name: told[name] for name in body} == body
    assert (told["source"], told["total_tokens"], told["request_id"]) == ("usage", 120, "r-1")
    assert sql("SELECT id FROM request_logs") == [(told["id"],)]
    assert client.post(LOGS, body, headers={"Idempotency-Key": "k"}).json == told
    assert sql("SELECT requests FROM model_usage") == [(1,)]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"provider_id": ""}, "provider_id"),
        ({"cost_usd": -1}, "cost_usd"),
        ({"cost_usd": 1e12}, "cost_usd"),
        ({"prompt_tokens": 1.5}, "prompt_tokens"),
        ({"status_code": 7}, "status_code"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x" * 9000}}, "metadata"),
        ({"user_id": "a\nb"}, "user_id"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_report_is_refused_and_the_field_is_named(
    client: AppClient, sql: Sql, wrong: dict[str, Any], field: str
) -> None:
    assert_problem(client.post(LOGS, USAGE | wrong), 400, "invalid")
    assert client.post(LOGS, USAGE | wrong).json["errors"][0]["field"] == field
    assert_problem(client.post(LOGS, {}), 400, "invalid")
    assert sql("SELECT count(*) FROM request_logs") == [(0,)]


def test_the_sums_are_exact_whoever_reports_at_the_same_time(client: AppClient, sql: Sql) -> None:
    def report(i: int) -> int:
        who = {"provider_id": f"p-{i % 2}", "user_id": f"u-{i % 3}", "cost_usd": 0.1 * (i % 7), "status_code": 200 + i}
        return client.post(LOGS, {**USAGE, **who, "latency_ms": i}).status

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(report, range(300))) == {201}
    columns = "sum({requests}), sum({errors}), sum(prompt_tokens + completion_tokens), sum(cost_usd), sum(latency_ms)"
    kept = columns.format(requests="requests", errors="errors")
    counted = columns.format(requests="1", errors="(status_code >= 400)::int")
    for key in ("provider_id, user_id", "model_name"):
        of_rows = sql(f"SELECT {key}, {counted} FROM request_logs GROUP BY {key} ORDER BY {key}")
        assert sql(f"SELECT {key}, {kept} FROM model_usage GROUP BY {key} ORDER BY {key}") == of_rows


# Writing


def test_a_row_is_written_once_although_the_answer_to_its_commit_is_lost(
    client: AppClient, rows: RequestRows, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.get("/api/v1/beads/b-1")
    end = db.Connection.end

    def cut(conn: db.Connection, how: str) -> None:
        end(conn, how)
        if how == "COMMIT":
            monkeypatch.undo()
            conn.cut()
            conn.execute("SELECT 1")

    monkeypatch.setattr(db.Connection, "end", cut)
    rows.write()
    assert rows.usage()["queued"] == 1, "as far as it knows"
    wait_until(lambda: (rows.write(), rows.usage() == {"queued": 0, "dropped": 0})[1])
    assert sql("SELECT count(*) FROM request_logs") == [(1,)]


def test_requests_are_served_and_their_rows_kept_while_the_table_is_locked(
    client: AppClient, rows: RequestRows, sql: Sql, session: Any, caplog: pytest.LogCaptureFixture
) -> None:
    conn: psycopg2.extensions.connection = session()
    with conn.cursor() as cursor:
        cursor.execute("LOCK TABLE request_logs")
    rows.start()
    began = time.monotonic()
    for _ in range(200):
        assert client.get("/api/v1/beads/b-1").status == 404
    assert time.monotonic() - began < 5
    wait_until(lambda: "request-rows-failed" in caplog.text)
    conn.rollback()
    wait_until(lambda: sql("SELECT count(*) FROM request_logs") == [(200,)])
    rows.stop()
    assert caplog.text.count("request-rows-failed") == 1


def test_an_orderly_end_writes_what_waits(client: AppClient, rows: RequestRows, sql: Sql) -> None:
    rows.start()
    client.get("/api/v1/beads/b-1")
    rows.stop()
    assert sql("SELECT count(*) FROM request_logs") == [(1,)]


def test_rows_beyond_the_bound_are_dropped_counted_and_told(
    client: AppClient, rows: RequestRows, sql: Sql, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_rows, "MOST_ROWS", 20)
    for _ in range(25):
        client.get("/api/v1/beads/b-1")
    assert rows.usage() == {"queued": 20, "dropped": 5}
    rows.write()
    assert sql("SELECT count(*) FROM request_logs") == [(20,)]
    (told,) = [record for record in caplog.records if record.getMessage() == "request-rows-dropped"]
    assert told.fields == {"count": 5}  # type: ignore[attr-defined]


# Partitions


def partitions(sql: Sql) -> list[str]:
    found = sql("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent::regclass::text = 'request_logs'")
    return sorted(name for (name,) in found)


def fill(sql: Sql, days: int, rows: int) -> None:
    """Rows of each of the last days but today, with their sums."""
    sql("SELECT open_request_logs(make_interval(days => %s), 0)", days)
    sql(
        "INSERT INTO request_logs (timestamp, id, provider_id, path)"
        " SELECT clock_timestamp() - make_interval(days => day), row, 'p', repeat('x', 200)"
        "   FROM generate_series(1, %s) AS day, generate_series(1, %s) AS row",
        days,
        rows,
    )
    sql(
        "INSERT INTO model_usage SELECT date_trunc('hour', timestamp), 'p', '', '', '', count(*), 0, 0, 0, 0, 0"
        "  FROM request_logs GROUP BY 1"
    )


def large_day(sql: Sql) -> None:
    """More than a megabyte of rows of today."""
    sql("SELECT open_request_logs('0', 0)")
    many = "generate_series(1, 3000)"
    sql(f"INSERT INTO request_logs (timestamp, id, path) SELECT now(), i, repeat('x', 500) FROM {many} AS i")


def test_days_older_than_the_setting_are_removed_and_the_next_ones_made(sql: Sql, cleaner: Upkeep) -> None:
    fill(sql, 40, 1)
    assert len(partitions(sql)) == 43
    sql("DROP TABLE " + ", ".join(partitions(sql)[-2:]))
    cleaner.clean()
    assert len(partitions(sql)) == 30 + 1 + 2
    assert sql("SELECT count(*), min(timestamp) > now() - INTERVAL '31 days' FROM request_logs") == [(30, True)]
    assert sql("SELECT sum(requests) FROM model_usage") == [(30,)]


def test_instances_that_need_the_same_new_days_at_once_all_go_on(client: AppClient, sql: Sql) -> None:
    for _ in range(5):
        sql("TRUNCATE request_logs")
        for name in partitions(sql):
            sql(f"DROP TABLE {name}")
        with ThreadPoolExecutor(8) as threads:
            assert [answer.status for answer in threads.map(lambda _: client.post(LOGS, USAGE), range(8))] == [201] * 8
        assert len(partitions(sql)) == 3


def test_the_oldest_days_are_removed_when_all_are_too_large_but_not_today(sql: Sql, instance: Any) -> None:
    fill(sql, 5, 4000)
    (day,) = sql(f"SELECT pg_total_relation_size('{partitions(sql)[0]}')")[0]
    cleaner = Upkeep(Config(logging=LoggingConfig(max_gb=2.5 * day / 1e9)), instance)
    cleaner.clean()
    assert sql("SELECT count(DISTINCT timestamp::date) FROM request_logs") == [(2,)]
    large_day(sql)
    Upkeep(Config(logging=LoggingConfig(max_gb=0.001)), instance).clean()
    assert sql("SELECT count(*), min(timestamp) > now() - INTERVAL '1 day' FROM request_logs") == [(3000, True)]


def test_a_day_that_is_too_large_takes_only_reports(
    client: AppClient, rows: RequestRows, sql: Sql, caplog: pytest.LogCaptureFixture
) -> None:
    rows._settings = lambda: Config(logging=LoggingConfig(max_gb=0.001))
    large_day(sql)
    for _ in range(3):
        client.get("/api/v1/beads/b-1")
        rows.write()
    assert client.post(LOGS, USAGE).status == 201
    assert sql("SELECT count(*) FROM request_logs WHERE path IS NULL OR path <> repeat('x', 500)") == [(1,)]
    assert rows.usage()["dropped"] == 3
    assert caplog.text.count("request-rows-failed") == 1


def test_a_long_read_delays_the_removal_of_old_days_and_stops_nobody(
    client: AppClient, sql: Sql, cleaner: Upkeep, session: Any
) -> None:
    fill(sql, 35, 1)
    conn: psycopg2.extensions.connection = session()
    with conn.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM request_logs")
    cleaner.clean()
    assert client.post(LOGS, USAGE).status == 201
    assert len(partitions(sql)) == 38
    conn.rollback()
    cleaner.clean()
    assert len(partitions(sql)) == 33
