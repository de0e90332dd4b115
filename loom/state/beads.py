"""Beads: units of work with dependencies."""

from __future__ import annotations

import graphlib
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import psycopg2

from loom import db, errors
from loom.state.entities import Entity, refusal
from loom.state.writer import Writer, call


class Bead(Entity, kw_only=True):
    """A unit of work. Its claim is `fencing_token` and the lease; `blocks` and `children` are derived."""

    type: str
    title: str
    description: str
    status: str
    priority: int
    project_id: str
    assigned_to: str | None = None
    parent: str | None = None
    children: list[str] = []
    blocked_by: list[str] = []
    blocks: list[str] = []
    related_to: list[str] = []
    tags: list[str] = []
    context: dict[str, Any] = {}
    due_date: datetime | None = None
    milestone_id: str | None = None
    estimated_time: int | None = None
    attempts: int
    failures: int
    blocked_reason: str | None = None
    close_reason: str | None = None
    closed_at: datetime | None = None
    not_before: datetime | None = None
    fencing_token: int | None = None
    claimed_at: datetime | None = None
    lease_seconds: int | None = None
    lease_expires_at: datetime | None = None


def create_many(conn: db.Connection, writer: Writer, given: Sequence[dict[str, Any]]) -> list[Bead]:
    """Creates all or none, in a transaction of the caller's. A `ref` names a bead for the others of the same call.

    Raises Cycle, Invalid (which names the place in the list) and what entities.change raises.
    """
    rows = db.all(
        conn,
        """
        SELECT COALESCE(b.it ->> 'id', new_entity_id('bead', b.it)) AS id
          FROM jsonb_array_elements(%(beads)s) WITH ORDINALITY AS b (it, place) ORDER BY place
        """,
        beads=json.dumps(given),
    )
    beads = {row["id"]: dict(bead) for row, bead in zip(rows, given, strict=True)}
    ids = {bead.pop("ref"): key for key, bead in beads.items() if bead.get("ref") is not None}
    _turn_around(beads, ids)
    order = graphlib.TopologicalSorter(
        {key: [*bead.get("blocked_by", ()), bead.get("parent")] for key, bead in beads.items()}
    )
    try:
        ordered = [key for key in order.static_order() if key in beads]
    except graphlib.CycleError as exc:
        cycle = exc.args[1][::-1]
        raise errors.Cycle(f"beads would wait for each other: {' -> '.join(cycle)}", cycle=cycle) from None
    try:
        made = call(
            conn,
            writer,
            """
            SELECT array_agg(c.outcome) AS outcomes, array_agg(c.detail) AS details
              FROM jsonb_array_elements(%(beads)s) AS b (it)
              CROSS JOIN LATERAL change_entity(
                  'bead', it ->> 'id', 'create', it - 'id', NULL, false, %(fences)s, NULL) AS c
            """,
            beads=json.dumps([{**beads[key], "id": key} for key in ordered]),
        )
    except psycopg2.DatabaseError as exc:
        raise refusal(exc) from exc
    for key, outcome in zip(ordered, made["outcomes"], strict=True):
        if outcome != "created":
            raise errors.Taken(f"The id {key} is {outcome}.", id=key)
    rows = db.all(conn, "SELECT id, as_json(t)::text AS it FROM beads t WHERE id = ANY (%(ids)s)", ids=list(beads))
    found = {row["id"]: msgspec.json.decode(row["it"], type=Bead) for row in rows}
    return [found[key] for key in beads]


def _turn_around(beads: dict[str, dict[str, Any]], ids: dict[str, str]) -> None:
    """Puts ids for refs; `blocks` and `children` of the same call become `blocked_by` and `parent` of the others."""
    for bead in beads.values():
        for field in ("blocked_by", "blocks", "children", "related_to"):
            if bead.get(field):
                bead[field] = [ids.get(other, other) for other in bead[field]]
        if bead.get("parent"):
            bead["parent"] = ids.get(bead["parent"], bead["parent"])
    for key, bead in beads.items():
        for other in bead.get("blocks", ()):
            if other in beads:
                beads[other]["blocked_by"] = [*beads[other].get("blocked_by", ()), key]
        for other in bead.get("children", ()):
            if other in beads:
                beads[other]["parent"] = key
        for field in ("blocks", "children"):
            if field in bead:
                bead[field] = [other for other in bead[field] if other not in beads]
