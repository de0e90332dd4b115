"""/api/v1/instances: the registry."""

from __future__ import annotations

from flask import Blueprint, Response

from loom import db, instances
from loom.http import answer

bp = Blueprint("instances", __name__, url_prefix="/api/v1/instances")


@bp.get("")
def list_all() -> Response:
    with db.connection() as conn:
        return answer.json(instances.rows(conn))


@bp.get("/<instance_id>")
def get(instance_id: str) -> Response:
    with db.connection() as conn:
        return answer.json(instances.get(conn, instance_id))
