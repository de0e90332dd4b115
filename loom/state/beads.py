"""Beads: units of work with dependencies."""

from __future__ import annotations

import graphlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import msgspec
import psycopg2

from loom import db, errors, refusals
from loom.db import Time
from loom.state.entities import Entity, Id
from loom.state.writer import Writer, call

Status = Literal["open", "in_progress", "blocked", "closed"]


class Bead(Entity, kw_only=True):
    """A unit of work. Its claim is `fencing_token` and the lease; `blocks` and `children` are derived."""

    statuses: ClassVar[tuple[str, ...]] = get_args(Status)
    orders: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("assigned_to", "status"),
        ("type", "status"),
        ("project_id", "status"),
        ("status",),
    )
    conditions: ClassVar[Mapping[str, str]] = {"tags": "tags && %(tags)s"}

    type: str
    title: str
    description: str
    status: Status
    priority: int
    project_id: Id
    assigned_to: Id | None = None
    parent: Id | None = None
    children: list[Id] = []
    blocked_by: list[Id] = []
    blocks: list[Id] = []
    related_to: list[Id] = []
    tags: list[str] = []
    context: dict[str, Any] = {}
    due_date: Time | None = None
    milestone_id: Id | None = None
    estimated_time: int | None = None
    attempts: int
    failures: int
    blocked_reason: str | None = None
    close_reason: str | None = None
    closed_at: Time | None = None
    not_before: Time | None = None
    fencing_token: int | None = None
    claimed_at: Time | None = None
    lease_seconds: int | None = None
    lease_expires_at: Time | None = None


def create_many(conn: db.Connection, writer: Writer, given: Sequence[dict[str, Any]]) -> list[Bead]:
    """Creates all or none. A `ref` names a bead for the others of the same call.

    Raises Taken, LockHeld, LockLost, ProjectClosed, Cycle, which shows refs, and Invalid, which names the place in the
    list.
    """
    keys = _new_keys(conn, given)
    ids = {bead["ref"]: key for key, bead in zip(keys, given, strict=True) if "ref" in bead}
    refs = {key: ref for ref, key in ids.items()}
    beads = {key: {**bead, "id": key, "place": n} for n, (key, bead) in enumerate(zip(keys, given, strict=True))}
    _turn_around(beads, ids)
    try:
        order = _in_order({key: bead.get("blocked_by", ()) for key, bead in beads.items()})
        row = call(
            conn,
            writer,
            "SELECT outcome, entities::text AS entities, detail FROM create_beads(%(beads)s, %(fences)s)",
            beads=msgspec.json.encode([beads[key] for key in order]).decode(),
        )
    except graphlib.CycleError as exc:
        raise _named(refusals.error("cycle", {"cycle": exc.args[1][::-1]}), given, refs) from exc
    except psycopg2.DatabaseError as exc:
        raise _named(refusals.from_postgres(exc) or exc, given, refs) from exc
    return msgspec.json.decode(row["entities"], type=list[Bead])


def _new_keys(conn: db.Connection, given: Sequence[dict[str, Any]]) -> list[str]:
    """An id for each, in their order; none that we make is one that another of them bears."""
    while True:
        rows = db.rows(
            conn,
            """
            SELECT COALESCE(b.it ->> 'id', new_entity_id('bead', b.it)) AS id
              FROM jsonb_array_elements(%(beads)s) WITH ORDINALITY AS b (it, place) ORDER BY place
            """,
            beads=json.dumps([{name: bead.get(name) for name in ("id", "project_id")} for bead in given]),
        )
        keys = [row["id"] for row in rows]
        if len(set(keys)) == len(keys):
            return keys


def _turn_around(beads: dict[str, dict[str, Any]], ids: dict[str, str]) -> None:
    """Puts ids for refs; `blocks` and `children` of the same call become `blocked_by` and `parent` of the others."""
    for bead in beads.values():
        for field in ("blocked_by", "blocks", "children", "related_to"):
            if field in bead:
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


def _in_order(waits_for: dict[str, Sequence[str]]) -> list[str]:
    """The beads, each after those that it waits for. Raises graphlib.CycleError."""
    order = graphlib.TopologicalSorter(waits_for)
    return [key for key in order.static_order() if key in waits_for]


def _named(problem: Exception, given: Sequence[dict[str, Any]], refs: dict[str, str]) -> Exception:
    """A problem of one of several beads, told in the caller's words."""
    if isinstance(problem, errors.Cycle):
        return refusals.error("cycle", {"cycle": [refs.get(key, key) for key in problem.members["cycle"]]})
    if isinstance(problem, errors.Invalid):
        for error in problem.members.get("errors", ()):
            for place, bead in enumerate(given):
                value = bead.get(error["field"])
                if error.get("value") in (value if isinstance(value, list) else [value]):
                    return errors.Invalid.field(f"beads[{place}].{error['field']}", error["problem"])
    return problem
