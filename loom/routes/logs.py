"""/api/v1/logs: the requests of all instances, and the use of models that agents report."""

from __future__ import annotations

from typing import Annotated, Any, get_args

import msgspec
from flask import Blueprint, Response, request
from msgspec import Meta

from loom import db, errors, instances
from loom.bounds import bounds
from loom.http import answer, idempotency, parse
from loom.state import logs

bp = Blueprint("logs", __name__, url_prefix="/api/v1/logs")

Amount = Annotated[float, Meta(ge=0, le=1e9)]


class ReportUsage(parse.Body):
    """One call of a model. `cost_usd` is kept with ten decimals."""

    provider_id: parse.Key
    model_name: parse.Actor = ""
    user_id: parse.Actor = ""
    project_id: parse.Reference = None
    agent_id: parse.Reference = None
    bead_id: parse.Reference = None
    prompt_tokens: parse.Count = 0
    completion_tokens: parse.Count = 0
    cost_usd: Amount = 0.0
    latency_ms: Amount = 0.0
    status_code: Annotated[int, Meta(ge=100, le=599)] = 200
    error_message: Annotated[str, Meta(max_length=10_000)] | None = None
    metadata: dict[str, str] | None = None


@bp.get("")
@parse.query(*parse.PAGE, "since", "until", *logs.FILTERS)
def some() -> Response:
    after, limit = parse.cursor(tuple[str, int]), answer.page_limit()
    since, until = parse.moment("since"), parse.moment("until")
    filters = _filters(*logs.FILTERS)
    with db.connection() as conn:
        found = logs.some(conn, since=since, until=until, after=after, limit=limit, filters=filters)
        response = answer.page(lambda _: found.page, logs.key_of)
    if found.seen is not None and not found.page.more:
        answer.linked(response, limit, found.seen)
    return response


@bp.post("")
def report() -> Response:
    usage = msgspec.structs.asdict(parse.body(ReportUsage))
    for name in ("error_message", "project_id", "agent_id", "bead_id"):
        usage[name] = usage[name] or None
    if usage["metadata"] is not None:
        usage["metadata"] = msgspec.json.encode(usage["metadata"]).decode()
        if len(usage["metadata"].encode()) > bounds.lock_metadata:
            raise errors.Invalid.field("metadata", f"must have at most {bounds.lock_metadata} bytes")

    def work(conn: db.Connection) -> Response:
        row = logs.report_usage(conn, usage, request.environ["HTTP_X_REQUEST_ID"], instances.own_id())
        return answer.json(row, 201)

    return idempotency.once(work)


@bp.get("/recent")
@parse.query("limit", "level", "source", "since", "until", "agent_id", "bead_id", "project_id")
def recent() -> Response:
    """As in the original: rows as lines of a log, newest first."""
    limit = parse.integer("limit", most=bounds.events, default=100)
    since, until = parse.moment("since"), parse.moment("until")
    filters = _filters("level", "source", "agent_id", "bead_id", "project_id")
    with db.connection() as conn:
        rows = list(logs.some(conn, since=since, until=until, limit=limit, filters=filters).page)
    return answer.json({"logs": [_line(row) for row in rows], "count": len(rows)})


def _filters(*names: str) -> dict[str, str | None]:
    few = {"source": get_args(logs.Source), "level": get_args(logs.Level)}
    return {name: parse.choice(name, few[name]) if name in few else parse.text(name) for name in names}


def _line(row: logs.RequestLog) -> dict[str, Any]:
    what = f"{row.method} {row.path}" if row.source == "request" else f"{row.provider_id} {row.model_name}".rstrip()
    message = f"{what} {row.status_code}" + (f": {row.error_message}" if row.error_message else "")
    about = {name: getattr(row, name) for name in ("request_id", "instance_id", "agent_id", "bead_id", "project_id")}
    metadata = {**(row.metadata or {}), **{name: value for name, value in about.items() if value is not None}}
    line = {"id": row.id, "timestamp": row.timestamp, "level": row.level, "source": row.source, "message": message}
    return {**line, "metadata": metadata}
