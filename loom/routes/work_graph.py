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
def graph() -> Response:
    """A page holds up to 10,000 beads with their edges; the pages together are the whole graph."""
    project, after = parse.text("project_id"), parse.cursor(str)
    with db.connection() as conn:
        now = work_graph.now(conn)
        return answer.page(
            lambda limit: entities.some(
                conn, Bead, filters={"project_id": [project]} if project else {}, after=after, limit=limit
            ),
            entities.key_of,
            lambda beads: work_graph.graph(beads, now),
        )
