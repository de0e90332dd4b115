"""/api/v1/events: the changes since a cursor."""

from __future__ import annotations

import time
from functools import partial
from typing import cast

from flask import Blueprint, Response, request

from loom import db
from loom.bounds import bounds
from loom.http import answer, parse
from loom.http.pollers import pollers, wait, waited
from loom.state import events
from loom.state.events import EventWaiter

bp = Blueprint("events", __name__, url_prefix="/api/v1/events")

LONGEST_WAIT = 25  # seconds; below the 30 s after which many proxies give up


@bp.get("")
@parse.query("after", "limit", "wait_seconds", "type", "entity_id", "project_id")
def feed() -> Response:
    after = parse.integer("after", least=0, most=parse.MAX_TOKEN) if "after" in request.args else None
    limit = parse.integer("limit", most=bounds.events, default=100)
    wait_seconds = parse.integer("wait_seconds", least=0, most=LONGEST_WAIT, default=0)
    filters = {name: parse.text(name) or None for name in ("type", "entity_id", "project_id")}
    before = cast(EventWaiter | None, waited())
    if before is not None:
        after = before.after
    page = _read(after, limit, time.monotonic() + wait_seconds if before is None else before.ends, filters)
    headers = {}
    if not page.events and wait_seconds:
        wait(pollers().events, partial(EventWaiter, page.next), wait_seconds)
        if before is None:
            headers["Retry-After"] = "1"  # too many wait
    return answer.json({"events": page.events, "count": len(page.events), "next": page.next}, headers=headers)


def _read(after: int | None, limit: int, ends: float, filters: dict[str, str | None]) -> events.Page:
    """Reads on to the newest event until some are found; after the time `ends`, only once."""
    while True:
        with db.connection() as conn:
            page = events.read(conn, after, limit, **filters)
        if page.events or page.next >= page.last or time.monotonic() >= ends:
            return page
        after = page.next
        db.default().start_request()
