"""Totals of the use of models that agents have reported: by provider, model, user, project, hour or day.

Whole hours are read from their sums in model_usage, the rest of a range from the rows. One statement sees both as they
were at one moment, so the totals are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timedelta, timezone
from typing import Literal

import msgspec

from loom import db

LATEST = datetime(9999, 1, 1, tzinfo=timezone.utc)  # there is always an hour after it
MOST_GROUPS = 1000  # of each kind: those with the most requests; of hours and days, the latest
RFC_3339 = 'YYYY-MM-DD"T"HH24:MI:SS"Z"'

By = Literal["provider", "model", "user", "project", "hour", "day"]
_COLUMNS: dict[str, str] = {
    "provider": "provider_id",
    "model": "model_name",
    "user": "user_id",
    "project": "project_id",
    "hour": "hour",
    "day": "date_trunc('day', hour, 'UTC')",
}


class Sums(msgspec.Struct, frozen=True):
    """`key`: what these uses have in common, for example their provider. `errors`: those of the level error or warn."""

    key: str
    requests: int
    errors: int
    tokens: int
    cost_usd: float
    avg_latency_ms: float


def sums(
    conn: db.Connection, start: datetime | None, end: datetime | None, user: str | None, by: Collection[By]
) -> tuple[Sums, dict[By, list[Sums]]]:
    """The sums of all uses from `start` to before `end`, and those of each kind of group in `by` (at least one).

    The groups with the most requests come first; hours and days are in their order.
    """
    # Whole hours are those from `first` to before `last`.
    start = start and min(start, LATEST)
    first, last = start and _hour_of(start), end and _hour_of(end)
    if start and first and first < start:
        first += timedelta(hours=1)
    times = {
        "start": start,
        "end": end,
        "first": first,
        "last": last,
        "head_end": min(filter(None, (first, end)), default=None),
    }
    whole = [f"hour {sign} %({name})s" for sign, name in ((">=", "first"), ("<", "last")) if times[name]]
    parts = [
        f"""
        SELECT hour, provider_id, model_name, user_id, project_id, requests, errors,
               prompt_tokens + completion_tokens AS tokens, cost_usd, latency_ms
          FROM model_usage WHERE {" AND ".join([*whole, "true"])}"""
    ]
    rows = """
        SELECT date_trunc('hour', timestamp, 'UTC'), provider_id, model_name, COALESCE(user_id, ''),
               COALESCE(project_id, ''), 1, (status_code >= 400 OR error_message IS NOT NULL)::integer,
               prompt_tokens + completion_tokens, cost_usd, latency_ms
          FROM request_logs WHERE provider_id IS NOT NULL"""
    if start != first:
        parts.append(f"{rows} AND timestamp >= %(start)s AND timestamp < %(head_end)s")
    if end != last and not (first and last and first > last):  # else both ends are in one hour, which was read above
        parts.append(f"{rows} AND timestamp >= %(last)s AND timestamp < %(end)s")
    keys = [f"{_COLUMNS[kind]} AS by_{kind}" for kind in by]
    columns = ", ".join(map(str, range(1, len(by) + 1)))
    # Summed by all keys at first, since sets of groups are made one after the other.
    sql = f"""
        WITH parts AS ({" UNION ALL ".join(parts)}),
        cells AS (
            SELECT {", ".join(keys)}, sum(requests)::bigint AS requests, sum(errors)::bigint AS errors,
                   sum(tokens)::bigint AS tokens, sum(cost_usd) AS cost_usd, sum(latency_ms) AS latency_ms
              FROM parts WHERE %(user)s IS NULL OR user_id = %(user)s GROUP BY {columns}),
        groups AS (
            SELECT {_case(by, repr)} AS kind, {_case(by, _key)} AS key, sum(requests)::bigint AS requests,
                   sum(errors)::bigint AS errors, sum(tokens)::bigint AS tokens, sum(cost_usd)::float8 AS cost_usd,
                   sum(latency_ms) / NULLIF(sum(requests), 0)::float8 AS avg_latency_ms
              FROM cells GROUP BY GROUPING SETS ((), {", ".join(f"(by_{kind})" for kind in by)}))
        SELECT kind, key, COALESCE(requests, 0) AS requests, COALESCE(errors, 0) AS errors,
               COALESCE(tokens, 0) AS tokens, COALESCE(cost_usd, 0) AS cost_usd,
               COALESCE(avg_latency_ms, 0) AS avg_latency_ms
          FROM (SELECT *, row_number() OVER (PARTITION BY kind
                          ORDER BY CASE WHEN kind IN ('hour', 'day') THEN key END DESC, requests DESC, key) AS rank
                  FROM groups) AS ranked
         WHERE rank <= {MOST_GROUPS} ORDER BY rank"""
    found: dict[str, list[Sums]] = {kind: [] for kind in ("", *by)}
    for row in db.rows(conn, sql, **times, user=user):
        found[row.pop("kind")].append(Sums(**row))
    for kind in ("hour", "day"):
        found.get(kind, []).reverse()
    (total,) = found.pop("")
    return total, found  # type: ignore[return-value]


def _case(by: Collection[By], value: Callable[[By], str]) -> str:
    """The value for the kind of group that a row is of."""
    return f"CASE {''.join(f'WHEN GROUPING(by_{kind}) = 0 THEN {value(kind)} ' for kind in by)} ELSE '' END"


def _key(kind: By) -> str:
    """The key as text; a time as RFC 3339."""
    return f"to_char(by_{kind}, '{RFC_3339}')" if kind in ("hour", "day") else f"by_{kind}"


def _hour_of(time: datetime) -> datetime:
    return time.replace(minute=0, second=0, microsecond=0)
