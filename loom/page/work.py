"""Beads: lists of them, what is ready, what is stuck, and one with what it waits for and its history."""

from __future__ import annotations

from typing import get_args

from flask import Blueprint, Response

from loom import db, overview
from loom.http import parse
from loom.page.render import ROWS, parameter, show
from loom.state import backlog, entities, events
from loom.state.beads import Bead, Status
from loom.totals import MOST

bp = Blueprint("page_work", __name__)

CHAINS = 20  # stuck beads on a page
FILTERS = ("status", "project_id", "assigned_to", "type")


@bp.get("/beads")
def some() -> Response:
    chosen = {name: parameter(name) for name in FILTERS}
    filters = {name: [value] for name, value in chosen.items() if value}
    after = parameter("after")
    if chosen["status"] and chosen["status"] not in get_args(Status):
        filters["status"] = []  # of which there are none
    with db.connection() as conn:
        page = entities.some(conn, Bead, filters=filters, after=after, limit=ROWS)
        found = list(page)
        more = found[-1].id if page.more else None
        numbers = overview.beads(conn)
        return show(
            conn,
            "beads.html",
            beads=found,
            chosen=chosen,
            statuses=get_args(Status),
            numbers=numbers,
            most=MOST,
            after=after,
            more=more,
        )


@bp.get("/ready")
def ready() -> Response:
    with db.connection() as conn:
        numbers = overview.beads(conn)
        return show(conn, "ready.html", ready=backlog.ready(conn, ROWS), rows=ROWS, numbers=numbers, most=MOST)


@bp.get("/leases")
def leases() -> Response:
    with db.connection() as conn:
        numbers = overview.beads(conn)
        return show(conn, "leases.html", leases=backlog.lapsing(conn, ROWS), rows=ROWS, numbers=numbers, most=MOST)


@bp.get("/stuck")
def stuck() -> Response:
    """The chains that begin with a bead which nobody will work on until a person says so."""
    after = parameter("after")
    with db.connection() as conn:
        roots = backlog.stuck(conn, after, CHAINS + 1)
        return show(
            conn,
            "stuck.html",
            chains=backlog.trees(conn, roots[:CHAINS], up=True),
            after=after,
            more=roots[CHAINS - 1] if len(roots) > CHAINS else None,
            numbers=overview.beads(conn),
            most=MOST,
        )


@bp.get("/bead")
def one() -> Response:
    key, before = parameter("id"), parse.cursor(int, "before")
    with db.connection() as conn:
        bead = entities.get(conn, Bead, key)
        page = events.history(conn, Bead.kind, key, before=before, limit=ROWS)
        entries = list(page)
        return show(
            conn,
            "bead.html",
            bead=bead,
            waits_for=backlog.trees(conn, [key], up=False),
            waiting=backlog.trees(conn, [key], up=True),
            claims=backlog.claims_of(conn, key, ROWS),
            entries=entries,
            more=parse.encode_cursor(entries[-1].place) if page.more else None,
        )
