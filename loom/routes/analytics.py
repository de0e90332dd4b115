"""/api/v1/analytics: what the models of agents have cost, as in the original. Counts the rows that name a provider."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import chain
from typing import Any, get_args

import msgspec
from flask import Blueprint, Response, request

from loom import db, errors
from loom.http import answer, parse
from loom.state import analytics, logs
from loom.state.logs import RequestLog

bp = Blueprint("analytics", __name__, url_prefix="/api/v1/analytics")

RANGE = ("start_time", "end_time", "user_id")
EXPORTS = 2  # at a time: while its client reads slowly, an export keeps a thread
CSV = {
    "Timestamp": "timestamp",
    "User ID": "user_id",
    "Method": "method",
    "Path": "path",
    "Provider ID": "provider_id",
    "Model": "model_name",
    "Prompt Tokens": "prompt_tokens",
    "Completion Tokens": "completion_tokens",
    "Total Tokens": "total_tokens",
    "Latency (ms)": "latency_ms",
    "Status Code": "status_code",
    "Cost (USD)": "cost_usd",
    "Error Message": "error_message",
}
_exports = threading.BoundedSemaphore(EXPORTS)


@bp.get("/logs")
@parse.query("provider_id", "start_time", "end_time")
def latest() -> Response:
    since, until = parse.moment("start_time"), parse.moment("end_time")
    filters = {"source": "usage", "provider_id": parse.text("provider_id")}
    with db.connection() as conn:
        return answer.json(list(logs.some(conn, since=since, until=until, limit=100, filters=filters).page))


@bp.get("/stats")
@parse.query(*RANGE, "group_by")
def stats() -> Response:
    total, groups = _sums()
    provider, user = groups["provider"], groups["user"]
    return answer.json(
        {
            "total_requests": total.requests,
            "total_tokens": total.tokens,
            "total_cost_usd": total.cost_usd,
            "avg_latency_ms": total.avg_latency_ms,
            "error_rate": total.errors / total.requests if total.requests else 0.0,
            "requests_by_user": {each.key: each.requests for each in user},
            "requests_by_provider": {each.key: each.requests for each in provider},
            "cost_by_provider": {each.key: each.cost_usd for each in provider},
            "cost_by_user": {each.key: each.cost_usd for each in user},
            "tokens_by_provider": {each.key: each.tokens for each in provider},
            "tokens_by_user": {each.key: each.tokens for each in user},
            "latency_by_provider": {each.key: each.avg_latency_ms for each in provider},
            **_asked(groups),
        }
    )


@bp.get("/costs")
@parse.query(*RANGE, "group_by")
def costs() -> Response:
    total, groups = _sums()
    return answer.json(
        {
            "total_cost_usd": total.cost_usd,
            "total_requests": total.requests,
            "total_tokens": total.tokens,
            "cost_per_request": total.cost_usd / total.requests if total.requests else 0.0,
            "cost_per_1k_tokens": 1000 * total.cost_usd / total.tokens if total.tokens else 0.0,
            "cost_by_provider": {each.key: each.cost_usd for each in groups["provider"]},
            "cost_by_user": {each.key: each.cost_usd for each in groups["user"]},
            "time_range": {"start": parse.moment("start_time"), "end": parse.moment("end_time")},
            **_asked(groups),
        }
    )


def _sums() -> tuple[analytics.Sums, dict[analytics.By, list[analytics.Sums]]]:
    start, end, user, by = parse.moment("start_time"), parse.moment("end_time"), parse.text("user_id"), _by()
    kinds: list[analytics.By] = ["provider", "user", *((by,) if by and by not in ("provider", "user") else ())]
    with db.connection() as conn:
        return analytics.sums(conn, start, end, user or None, kinds)


def _by() -> analytics.By | None:
    return parse.choice("group_by", get_args(analytics.By))  # type: ignore[return-value]


def _asked(groups: dict[analytics.By, list[analytics.Sums]]) -> dict[str, Any]:
    by = _by()
    return {"groups": groups[by]} if by else {}


@bp.get("/export")
@parse.query(*RANGE, "format")
def export() -> Response:
    form, since, until = parse.choice("format", ("json", "csv")), parse.moment("start_time"), parse.moment("end_time")
    filters = {"source": "usage", "user_id": parse.text("user_id")}
    kind, encode = ("text/csv; charset=utf-8", _csv) if form == "csv" else ("application/json", _json)
    response = Response(content_type=kind)
    response.headers["Content-Disposition"] = f'attachment; filename="logs.{form or "json"}"'
    if request.method == "HEAD":
        return response
    if not _exports.acquire(blocking=False):
        raise errors.Busy(f"This instance already sends {EXPORTS} exports.")
    response.call_on_close(_exports.release)
    try:
        pages = logs.every(since, until, filters)
        response.response = encode(chain([next(pages)], pages))  # the first one now: an error still has its status
    except BaseException:
        _exports.release()
        raise
    return response


def _json(pages: Iterable[list[RequestLog]]) -> Iterator[bytes]:
    begin = b"["
    for rows in pages:
        if rows:
            yield begin + b",\n".join(map(msgspec.json.encode, rows))
            begin = b",\n"
    yield b"]\n" if begin != b"[" else b"[]\n"


def _csv(pages: Iterable[list[RequestLog]]) -> Iterator[bytes]:
    yield _lines([list(CSV)])
    for rows in pages:
        yield _lines([[_cell(getattr(row, name)) for name in CSV.values()] for row in rows])


def _cell(value: Any) -> Any:
    return answer.encoded(value).decode().strip(' "\n') if isinstance(value, datetime) else value


def _lines(cells: list[list[Any]]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows(cells)
    return file.getvalue().encode()
