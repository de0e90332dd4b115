"""/api/v1/instances: the registry."""

from __future__ import annotations

from flask import Blueprint, Response

from loom import db, instances
from loom.http import answer, parse

bp = Blueprint("instances", __name__, url_prefix="/api/v1/instances")


@bp.get("")
@parse.query(*parse.PAGE)
def some() -> Response:
    after = parse.cursor(tuple[str, str])
    with db.connection() as conn:
        return answer.page(
            lambda limit: instances.some(conn, after=after, limit=limit),
            lambda row: (row.started_at.isoformat(), row.instance_id),
        )


@bp.get("/<instance_id>")
def get(instance_id: str) -> Response:
    with db.connection() as conn:
        return answer.json(instances.get(conn, instance_id))
