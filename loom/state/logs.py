"""The request logs: a row for each HTTP request, and for each use of a model that agents have reported."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

import msgspec

from loom import db
from loom.config import LoggingConfig
from loom.db import Time
from loom.state.request_rows import GB

SCAN = 100_000  # rows that a read with filters looks at; 0.1 s when none of them matches

PART = 1000  # rows of `every` that one statement reads

Source = Literal["request", "usage"]
Level = Literal["info", "warn", "error"]
Key = tuple[str, int]  # the timestamp and the id of a row, as a cursor

COLUMNS = """
    id, timestamp, CASE WHEN provider_id IS NULL THEN 'request' ELSE 'usage' END AS source,
    CASE WHEN status_code >= 500 OR error_message IS NOT NULL THEN 'error'
         WHEN status_code >= 400 THEN 'warn' ELSE 'info' END AS level,
    request_id, instance_id, COALESCE(user_id, '') AS user_id, COALESCE(method, '') AS method, route,
    COALESCE(path, '') AS path, COALESCE(status_code, 0) AS status_code, COALESCE(latency_ms, 0) AS latency_ms,
    database_ms, lock_name, bead_id, agent_id, project_id, COALESCE(provider_id, '') AS provider_id,
    COALESCE(model_name, '') AS model_name, COALESCE(prompt_tokens, 0) AS prompt_tokens,
    COALESCE(completion_tokens, 0) AS completion_tokens,
    COALESCE(prompt_tokens + completion_tokens, 0) AS total_tokens, COALESCE(cost_usd, 0) AS cost_usd,
    error_message, metadata"""
# Filters that compare a column of the answer with a text.
FILTERS = (
    *("source", "level", "request_id", "instance_id", "user_id", "method", "route", "status_code"),
    *("lock_name", "bead_id", "agent_id", "project_id", "provider_id", "model_name"),
)


class RequestLog(msgspec.Struct, frozen=True, kw_only=True):
    """A request, or a use of a model (`source`: usage). The latter has a provider, the former a method and a path.

    `timestamp`: when it ended, or was reported. `level`: error (a status from 500, or an error message), warn (from
    400), or info.
    """

    id: int
    timestamp: Time
    source: Source
    level: Level
    request_id: str | None
    instance_id: str | None
    user_id: str
    method: str
    route: str | None
    path: str
    status_code: int
    latency_ms: float
    database_ms: float | None
    lock_name: str | None
    bead_id: str | None
    agent_id: str | None
    project_id: str | None
    provider_id: str
    model_name: str
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cost_usd: float
    error_message: str | None
    metadata: dict[str, str] | None


class Found(NamedTuple):
    """Some rows. `seen`: up to which row it has looked, if it has not looked at all of them."""

    page: db.Page[RequestLog]
    seen: Key | None


def key_of(row: RequestLog) -> Key:
    return row.timestamp.isoformat(), row.id


def some(
    conn: db.Connection,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    after: Key | None = None,
    limit: int,
    oldest_first: bool = False,
    filters: Mapping[str, str | None] | None = None,
) -> Found:
    """Rows from `since` to before `until`, newest first; only those behind the row `after`. `filters`: see FILTERS.

    With filters it looks at SCAN rows.
    """
    wanted = {name: value for name, value in (filters or {}).items() if value}
    usage = wanted.get("source") == "usage" or any(name in wanted for name in ("provider_id", "model_name"))
    order, beyond = ("ASC", ">") if oldest_first else ("DESC", "<")
    bounds = {"since": since, "until": until, "after": after and after[0], "after_id": after and after[1]}
    rows = f"""
        FROM request_logs
        WHERE {"provider_id IS NOT NULL" if usage else "true"}
              {"AND timestamp >= %(since)s" if since else ""} {"AND timestamp < %(until)s" if until else ""}
              {f"AND (timestamp, id) {beyond} (%(after)s, %(after_id)s)" if after else ""}
        ORDER BY timestamp {order}, id {order}"""
    last = None
    if wanted.keys() - {"source"} or (wanted and not usage):
        last = db.one(conn, f"SELECT timestamp, id {rows} OFFSET {SCAN - 1} LIMIT 1", **bounds)
    where = " AND ".join(f"{name}::text = %({name})s" for name in wanted) or "true"
    sql = f"""
        SELECT row_to_json(l)::text
          FROM (SELECT {COLUMNS} {rows} LIMIT {SCAN if last else "ALL"} OFFSET 0) AS l
         WHERE {where} LIMIT %(most_rows)s + 1"""
    page = db.Page(conn, RequestLog, sql, limit, **bounds, **wanted)
    return Found(page, (last["timestamp"].isoformat(), last["id"]) if last else None)


def every(
    since: datetime | None, until: datetime | None, filters: Mapping[str, str | None]
) -> Iterator[list[RequestLog]]:
    """All rows from `since` to before `until`, or before now, oldest first; each part by a statement of its own.

    So no transaction is open while a slow client reads, and the removal of old days waits for none.
    """
    after = None
    while True:
        db.default().start_request()
        try:
            with db.connection() as conn:
                until = until or db.value(conn, "SELECT clock_timestamp()")
                found = some(
                    conn, since=since, until=until, after=after, limit=PART, oldest_first=True, filters=filters
                )
                rows = list(found.page)
        finally:
            db.end_of_answer()
        yield rows
        if not found.page.more and found.seen is None:
            return
        after = key_of(rows[-1]) if found.page.more else found.seen


def report_usage(
    conn: db.Connection, usage: Mapping[str, Any], request_id: str | None, instance_id: str | None
) -> RequestLog:
    """Adds a use of a model to the logs, and to the sums of its hour."""
    # Two statements in one message, and so in one transaction. Of the sums, one row is written: no deadlock.
    columns = (
        *("id", "request_id", "instance_id", "user_id", "provider_id", "model_name", "prompt_tokens"),
        *("completion_tokens", "cost_usd", "latency_ms", "status_code", "error_message", "metadata"),
        *("project_id", "agent_id", "bead_id"),
    )
    values = ", ".join(f"%({name})s" for name in columns)
    row = db.row(
        conn,
        f"""
        SELECT open_request_logs('0', 0);
        WITH row AS (
            INSERT INTO request_logs (timestamp, {", ".join(columns)})
            VALUES (clock_timestamp(), {values}) RETURNING *),
        sums AS (
            INSERT INTO model_usage AS u
            SELECT date_trunc('hour', timestamp, 'UTC'), provider_id, model_name, COALESCE(user_id, ''),
                   COALESCE(project_id, ''), 1, (status_code >= 400 OR error_message IS NOT NULL)::integer,
                   prompt_tokens, completion_tokens, cost_usd, latency_ms
              FROM row
            ON CONFLICT (hour, provider_id, model_name, user_id, project_id) DO UPDATE
               SET (requests, errors, prompt_tokens, completion_tokens, cost_usd, latency_ms)
                   = (u.requests + 1, u.errors + excluded.errors, u.prompt_tokens + excluded.prompt_tokens,
                      u.completion_tokens + excluded.completion_tokens, u.cost_usd + excluded.cost_usd,
                      u.latency_ms + excluded.latency_ms))
        SELECT row_to_json(l)::text AS it FROM (SELECT {COLUMNS} FROM row) AS l""",
        **usage,
        id=random.getrandbits(53),
        request_id=request_id,
        instance_id=instance_id,
    )
    return msgspec.json.decode(row["it"], type=RequestLog)


def open_days(conn: db.Connection) -> None:
    """Makes the partitions of the next days."""
    db.run(conn, "SELECT open_request_logs('0', 0)")


def trim(conn: db.Connection, settings: LoggingConfig) -> str | None:
    """Removes the oldest partition if it is too old, or all of them are too large. Returns its name."""
    keep, most = timedelta(days=settings.retention_days), int(settings.max_gb * GB)
    return db.value(conn, "SELECT trim_request_logs(%(keep)s, %(most)s)", keep=keep, most=most)
