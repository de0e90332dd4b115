"""/api/v1/grants: who held which lock, when, and how it ended."""

from __future__ import annotations

from flask import Blueprint, Response

from loom import db, locks
from loom.http import answer, parse

bp = Blueprint("grants", __name__, url_prefix="/api/v1/grants")


@bp.get("")
@parse.query(*parse.PAGE, "lock_name", "owner")
def history() -> Response:
    name, owner, before = parse.text("lock_name"), parse.text("owner"), parse.cursor(int)
    with db.connection() as conn:
        return answer.page(
            lambda limit: locks.history(conn, name=name, owner=owner, before=before, limit=limit),
            lambda grant: grant.fencing_token,
        )
