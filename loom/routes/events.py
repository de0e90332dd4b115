"""/api/v1/events: the changes since a cursor."""

from __future__ import annotations

import time

from flask import Blueprint, Response, request

from loom import db
from loom.config import bounds
from loom.http import answer, parse
from loom.http.pollers import client_gone_check, pollers
from loom.state import events
from loom.state.events import EventWaiter

bp = Blueprint("events", __name__, url_prefix="/api/v1/events")

LONGEST_WAIT = 25  # seconds; below the 30 s after which many proxies give up


@bp.get("")
@parse.query("after", "limit", "wait_seconds", "type", "entity_id", "project_id")
def feed() -> Response:
    after = parse.integer("after", least=0, most=parse.MAX_TOKEN) if "after" in request.args else None
    limit = parse.integer("limit", most=bounds.events, default=100)
    until = time.monotonic() + parse.integer("wait_seconds", least=0, most=LONGEST_WAIT, default=0)
    filters = {name: parse.text(name) or None for name in ("type", "entity_id", "project_id")}
    headers = {}
    while True:
        with db.connection() as conn:
            page = events.read(conn, after, limit, **filters)
        after, left = page.next, until - time.monotonic()
        if page.events or left <= 0:
            break
        if after >= page.last:
            if pollers().events.full:
                headers["Retry-After"] = "1"
                break
            if pollers().events.wait(EventWaiter(after, client_gone_check()), left) is None:
                break
        db.default().start_request()
    return answer.json({"events": page.events, "count": len(page.events), "next": page.next}, headers=headers)
