"""/api/v1/work-graph: beads and the edges between them."""

from __future__ import annotations

from flask import Blueprint, Response

from loom import db
from loom.http import answer, parse
from loom.state import entities, work_graph
from loom.state.beads import Bead

bp = Blueprint("work_graph", __name__, url_prefix="/api/v1/work-graph")


@bp.get("")
@parse.query(*parse.PAGE, "project_id")
def some() -> Response:
    """A page holds up to 10,000 beads with their edges; the pages together are the whole graph."""
    project, after, limit = parse.text("project_id"), parse.cursor(str), answer.page_limit()
    filters = {"project_id": [project]} if project else {}
    with db.connection() as conn:
        now = work_graph.now(conn)
        db.begin_large_page(conn)  # its edges may be larger than its beads
        graph, last = work_graph.graph(entities.some(conn, Bead, filters=filters, after=after, limit=limit), now)
        response = answer.json(graph)
    return response if last is None else answer.linked(response, limit, last)
