"""The front page: is all well, and what happens; the search."""

from __future__ import annotations

from flask import Blueprint, Response

from loom import db, overview, traffic
from loom.page import charts
from loom.page.render import parameter, show
from loom.search import search
from loom.state import backlog, events, work_graph
from loom.totals import MOST

bp = Blueprint("page_overview", __name__)

ROWS = 8  # of each list


@bp.get("/")
def front() -> Response:
    with db.connection() as conn:
        seen, now = overview.read(conn), work_graph.now(conn)
        return show(
            conn,
            "overview.html",
            seen=seen,
            most=MOST,
            rows=ROWS,
            charts=charts.hour(traffic.last_hour(conn), now.second + now.microsecond / 1e6),
            shares=traffic.shares(conn),
            ready=backlog.ready(conn, ROWS),
            events=events.read(conn, None, ROWS).events[::-1],
        )


@bp.get("/search")
def find() -> Response:
    beginning = parameter("q").strip()
    with db.connection() as conn:
        return show(conn, "search.html", q=beginning, found=search(conn, beginning) if beginning else [])
