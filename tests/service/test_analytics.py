"""What models cost is told exactly, for any time, by provider, model, user, project, hour and day."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from harness import AppClient
from harness.locks import Sql, assert_problem

from loom.routes import analytics
from loom.state import logs

PATH = "/api/v1/analytics"
TODAY = datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)


def spend(sql: Sql, seed: int, count: int = 2000) -> list[dict[str, Any]]:
    """Uses within the last two days, spread over hours, with their sums, as they would have been reported then."""
    sql("SELECT open_request_logs('3 days', 0)")
    sql(
        "INSERT INTO request_logs (timestamp, id, provider_id, model_name, user_id, project_id, prompt_tokens,"
        "                          completion_tokens, cost_usd, latency_ms, status_code, error_message)"
        " SELECT %s - i * INTERVAL '79 seconds', i, 'p-' || random_of(3), 'm-' || random_of(2), 'u-' || random_of(4),"
        "        NULLIF('s-' || random_of(3), 's-0'), random_of(1000), random_of(100), random_of(1000) / 1000.0,"
        "        random_of(500), 200 + 250 * random_of(2), CASE WHEN random_of(9) = 0 THEN 'broken' END"
        "   FROM generate_series(1, %s) AS i",
        TODAY,
        count,
    )
    sql(
        "INSERT INTO model_usage SELECT date_trunc('hour', timestamp), provider_id, model_name, user_id,"
        "       COALESCE(project_id, ''), count(*), count(*) FILTER (WHERE status_code >= 400 OR error_message <> ''),"
        "       sum(prompt_tokens), sum(completion_tokens), sum(cost_usd), sum(latency_ms)"
        "  FROM request_logs GROUP BY 1, 2, 3, 4, 5"
    )
    sql("INSERT INTO request_logs (timestamp, id, path, status_code) VALUES (%s, 0, '/', 500)", TODAY)
    columns = "timestamp, provider_id, model_name, user_id, COALESCE(project_id, ''), prompt_tokens + completion_tokens"
    found = sql(
        f"SELECT {columns}, cost_usd::float8, latency_ms, (status_code >= 400 OR error_message IS NOT NULL)::int"
        "  FROM request_logs WHERE provider_id IS NOT NULL"
    )
    names = ("time", "provider", "model", "user", "project", "tokens", "cost", "latency", "error")
    return [dict(zip(names, row, strict=True)) for row in found]


@pytest.fixture
def spent(sql: Sql, seed: int) -> list[dict[str, Any]]:
    sql("CREATE FUNCTION random_of(n integer) RETURNS integer LANGUAGE sql AS 'SELECT floor(random() * n)::integer'")
    sql(f"SELECT setseed({seed / 2**31})")
    return spend(sql, seed)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


def total(rows: Iterable[dict[str, Any]], what: str) -> float:
    return sum(row[what] for row in rows)


def of(rows: list[dict[str, Any]], by: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        hour = row["time"].replace(minute=0, second=0, microsecond=0)
        key = {"hour": hour, "day": hour.replace(hour=0)}.get(by)
        found.setdefault(f"{key:%Y-%m-%dT%H:%M:%SZ}" if key else row[by], []).append(row)
    return found


def moment(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def test_the_totals_of_any_time_are_those_of_its_rows(
    client: AppClient, spent: list[dict[str, Any]], seed: int
) -> None:
    chance = random.Random(seed)
    times = [TODAY - timedelta(seconds=chance.randrange(160_000)) for _ in range(40)]
    times += [time.replace(minute=0, second=0) for time in times[:10]]
    cases: list[tuple[datetime | None, datetime | None]] = [(None, None), (times[0], None), (None, times[1])]
    cases += [(chance.choice(times), chance.choice(times)) for _ in range(60)]
    cases += [(time, time + timedelta(minutes=chance.randrange(90))) for time in times]
    for start, end in cases:
        query = "&".join(f"{name}_time={moment(time)}" for name, time in (("start", start), ("end", end)) if time)
        rows = [r for r in spent if (not start or r["time"] >= start) and (not end or r["time"] < end)]
        found = client.get(f"{PATH}/stats?{query}").json
        assert (found["total_requests"], found["total_tokens"]) == (len(rows), total(rows, "tokens")), query
        assert found["total_cost_usd"] == close(total(rows, "cost")), query
        assert found["error_rate"] == close(total(rows, "error") / max(1, len(rows))), query


def test_the_totals_are_told_by_every_kind_of_group(client: AppClient, spent: list[dict[str, Any]]) -> None:
    for by in ("provider", "model", "user", "project", "hour", "day"):
        rows = of(spent, by)
        for each in client.get(f"{PATH}/costs?group_by={by}").json["groups"]:
            group = rows.pop(each["key"])
            assert (each["requests"], each["tokens"]) == (len(group), total(group, "tokens"))
            assert each["errors"] == total(group, "error")
            assert each["cost_usd"] == close(total(group, "cost"))
            assert each["avg_latency_ms"] == close(total(group, "latency") / len(group))
        assert rows == {}
    stats = client.get(f"{PATH}/stats").json
    for by in ("provider", "user"):
        rows = of(spent, by)
        assert stats[f"requests_by_{by}"] == {key: len(group) for key, group in rows.items()}
        assert stats[f"tokens_by_{by}"] == {key: total(group, "tokens") for key, group in rows.items()}
        assert stats[f"cost_by_{by}"] == {key: close(total(group, "cost")) for key, group in rows.items()}
    hours = [each["key"] for each in client.get(f"{PATH}/stats?group_by=hour").json["groups"]]
    assert hours == sorted(hours)


def test_a_users_costs_are_told_alone(client: AppClient, spent: list[dict[str, Any]]) -> None:
    rows = of(spent, "user")["u-1"]
    start = moment(TODAY - timedelta(days=30))
    found = client.get(f"{PATH}/costs?user_id=u-1&start_time={start}").json
    assert found["cost_by_user"] == {"u-1": close(total(rows, "cost"))}
    assert found["cost_per_request"] == close(total(rows, "cost") / len(rows))
    assert found["cost_per_1k_tokens"] == close(1000 * total(rows, "cost") / total(rows, "tokens"))
    assert found["time_range"] == {"start": start, "end": None}


def test_without_a_use_every_total_is_zero(client: AppClient) -> None:
    stats, costs = client.get(f"{PATH}/stats?group_by=model").json, client.get(f"{PATH}/costs").json
    assert all(not value for value in stats.values())
    assert costs.pop("time_range") == {"start": None, "end": None}
    assert all(not value for value in costs.values())
    for query in ("group_by=colour", "start_time=now", "end_time=2026-13-01T00:00:00Z", "format=json"):
        assert_problem(client.get(f"{PATH}/stats?{query}"), 400, "invalid")
    assert client.get(f"{PATH}/stats?start_time=9999-12-31T23:30:00Z").json["total_requests"] == 0
    assert client.get(f"{PATH}/stats?end_time=0001-01-01T00:30:00Z").json["total_requests"] == 0


def test_an_export_has_every_use_once_oldest_first(
    client: AppClient, spent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PART", 300)
    monkeypatch.setattr(logs, "SCAN", 400)
    answer = client.get(f"{PATH}/export")
    assert answer.headers["Content-Disposition"] == 'attachment; filename="logs.json"'
    assert len({row["id"] for row in answer.json}) == len(answer.json) == len(spent)
    assert [row["timestamp"] for row in answer.json] == sorted(moment(row["time"]) for row in spent)
    table = list(csv.reader(io.StringIO(client.get(f"{PATH}/export?format=csv").body.decode())))
    header = "Timestamp,User ID,Method,Path,Provider ID,Model,Prompt Tokens,Completion Tokens,Total Tokens,Latency (ms)"
    assert table[0] == [*header.split(","), "Status Code", "Cost (USD)", "Error Message"]
    assert [row[0] for row in table[1:]] == [row["timestamp"] for row in answer.json]
    assert sum(float(row[11]) for row in table[1:]) == close(total(spent, "cost"))
    some = client.get(f"{PATH}/export?user_id=u-1&end_time={moment(TODAY - timedelta(hours=9))}").json
    wanted = [row for row in spent if row["user"] == "u-1" and row["time"] < TODAY - timedelta(hours=9)]
    assert len(some) == len(wanted)
    assert json.loads(client.get(f"{PATH}/export?user_id=nobody").body) == []
    assert client.request("HEAD", f"{PATH}/export?format=csv").status == 200
    assert [row["id"] for row in client.get(f"{PATH}/logs").json] == list(range(1, 101))


def test_an_export_that_fails_or_ends_leaves_room_for_the_next(client: AppClient, spent: Any) -> None:
    for _ in range(2 * analytics.EXPORTS):
        assert client.get(f"{PATH}/export?user_id=u-1").status == 200
        assert client.request("HEAD", f"{PATH}/export").status == 200
    for _ in range(analytics.EXPORTS):
        analytics._exports.acquire()
    assert_problem(client.get(f"{PATH}/export"), 503, "busy")
    for _ in range(analytics.EXPORTS):
        analytics._exports.release()
