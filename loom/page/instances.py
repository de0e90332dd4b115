"""The instances."""

from __future__ import annotations

from flask import Blueprint, Response

from loom import db, instances, locks, traffic
from loom.page.render import parameter, show

bp = Blueprint("page_instances", __name__)


@bp.get("/instances")
def some() -> Response:
    with db.connection() as conn:
        return show(conn, "instances.html", shares=traffic.shares(conn))


@bp.get("/instance")
def one() -> Response:
    with db.connection() as conn:
        found = instances.get(conn, parameter("id"))
        own = list(locks.held(conn, owner=f"instance:{found.instance_id}", limit=20))
        return show(conn, "instance.html", instance=found, own=own, share=traffic.shares(conn).get(found.instance_id))
