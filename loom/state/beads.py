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
from loom.state.entities import Action, Entity, Id, Steps, enter, values
from loom.state.writer import Writer, call

# The fields that name beads for which this one waits, or which wait for this one.
LINKS = ("blocked_by", "parent", "blocks", "children")
Status = Literal["open", "in_progress", "blocked", "deferred", "closed"]

FOREIGN = "SELECT refuse_foreign_change('bead', '', true, %(blocked)s::text[] || %(adopted)s::text[]);"


class Bead(Entity, kw_only=True):
    """A unit of work. Its claim is `fencing_token` and the lease; `blocks` and `children` are derived."""

    kind: ClassVar[str] = "bead"
    table: ClassVar[str] = "beads"
    new_id: ClassVar[str] = "new_bead_id(%(project_id)s)"
    derived: ClassVar[frozenset[str]] = frozenset({"blocks", "children"})
    statuses: ClassVar[tuple[str, ...]] = get_args(Status)
    indexed: ClassVar[tuple[str, ...]] = ("assigned_to", "type", "project_id")
    conditions: ClassVar[Mapping[str, str]] = {"tags": "tags && %(tags)s"}
    together: ClassVar[Mapping[str, str]] = {"not_before": "status"}  # see end_delays() for an UPDATE that does not

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

    @classmethod
    def steps(cls, key: str, action: Action, patch: Mapping[str, Any]) -> Steps:
        """Other beads are locked before this one's row; `blocks` and `children` are written to them afterwards."""
        links = not patch.keys().isdisjoint(LINKS)
        if action != "delete" and not links and "status" not in patch:
            return Steps(
                enter(key, "ARRAY['agent:' || agent_named(%(assigned_to)s)]" if patch.get("assigned_to") else "'{}'")
            )
        return Steps(
            f"""
            SELECT enter_bead({key}, %(blocked_by)s, %(parent)s, %(blocks)s, %(children)s, %(links)s, %(new_status)s,
                              %(agent)s, %(deletes)s, %(fences)s)
            """,
            "SELECT link_bead(%(blocked_by)s, %(parent)s, %(blocks)s, %(children)s)" if links else "",
            {
                **{field: patch.get(field) for field in LINKS},
                "links": links,
                "new_status": patch.get("status"),
                "agent": patch.get("assigned_to"),
            },
        )


def create_many(conn: db.Connection, writer: Writer, given: Sequence[dict[str, Any]]) -> list[Bead]:
    """Creates all or none. A `ref` names a bead for the others of the same call.

    Raises Taken, LockHeld, LockLost, ProjectClosed, Cycle, which shows refs, and Invalid, which names the place in the
    list.
    """
    keys = _new_keys(conn, given)
    ids = {bead["ref"]: key for key, bead in zip(keys, given, strict=True) if "ref" in bead}
    refs = {key: ref for ref, key in ids.items()}
    beads = {key: {**bead, "id": key, "place": n} for n, (key, bead) in enumerate(zip(keys, given, strict=True))}
    _normalise_links(beads, ids)
    try:
        order = _in_order(_waits_for(beads))
        return _create([beads[key] for key in order], conn, writer)
    except graphlib.CycleError as exc:
        raise _named(refusals.error("cycle", {"cycle": exc.args[1][::-1]}), given, refs) from exc
    except psycopg2.DatabaseError as exc:
        raise _named(refusals.from_postgres(exc) or exc, given, refs) from exc


def _create(new: list[dict[str, Any]], conn: db.Connection, writer: Writer) -> list[Bead]:
    """Inserts beads in this order, with `place` as the order of their age, and links them to others that exist."""
    blocked: dict[str, list[str]] = {}  # existing bead -> new ones that block it
    parents: dict[str, str] = {}  # existing bead -> its new parent
    for bead in sorted(new, key=lambda bead: bead["place"]):
        for other in bead.get("blocks", ()):
            blocked.setdefault(other, []).append(bead["id"])
        parents |= dict.fromkeys(bead.get("children", ()), bead["id"])
    ids = {bead["id"] for bead in new}
    # Existing beads that will wait for new ones, and existing ones for which new ones will wait. Only with both can new
    # beads close a cycle with existing ones.
    waiting = {*blocked, *(bead["parent"] for bead in new if bead.get("parent") and bead["parent"] not in ids)}
    waited_for = {*parents, *(other for bead in new for other in bead.get("blocked_by", ()) if other not in ids)}
    linked = sorted(waiting) if waited_for else []
    columns = list(dict.fromkeys(name for bead in new for name in bead if name not in {"ref", "place", *Bead.derived}))
    rows: list[str] = []
    params: dict[str, Any] = {}
    for n, bead in enumerate(new):
        row = values({column: bead[column] for column in columns if column in bead})
        params |= {f"{column}_{n}": value for column, value in row.items()}
        age = f"statement_timestamp() + {bead['place']} * INTERVAL '1 us'"
        given = [f"%({column}_{n})s" if column in row else "DEFAULT" for column in columns]
        rows.append(f"({', '.join([age, age, *given])})")
    # A new bead's own name is not locked: nobody else can change what does not exist yet. The cycles are checked at the
    # end, and all is inserted by one statement, since a parent may come after its children.
    row = call(
        conn,
        writer,
        f"""
        SELECT refuse_many_beads(cardinality(%(names)s::text[] || %(agents)s::text[]));
        SELECT enter_names(%(names)s::text[] || ARRAY(
            SELECT 'agent:' || agent_named(a) FROM unnest(%(agents)s::text[]) AS a), %(fences)s);
        SELECT refuse_held(%(own_names)s::text[], %(fences)s);
        {FOREIGN if writer.restricted else ""}
        {"SELECT lock_bead_graph();" if linked else ""}
        SELECT lock_beads(NULL, %(others)s::text[] || ARRAY(
            SELECT parent FROM beads WHERE id = ANY (%(adopted)s) AND parent IS NOT NULL), false);
        SELECT set_config('loom.cycles', 'later', true);
        INSERT INTO beads (created_at, updated_at, {", ".join(columns)}) VALUES {", ".join(rows)};
        SELECT refuse_unknown_beads('blocks', %(blocked)s::text[]);
        SELECT refuse_unknown_beads('children', %(adopted)s::text[]);
        UPDATE beads b SET blocked_by = b.blocked_by || ARRAY(SELECT jsonb_array_elements_text(l.value))
          FROM jsonb_each(%(blockers)s) AS l WHERE b.id = l.key;
        UPDATE beads b SET parent = l.value FROM jsonb_each_text(%(parents)s) AS l WHERE b.id = l.key;
        SELECT set_config('loom.cycles', '', true);
        SELECT refuse_crowded(%(waited_for)s::text[], %(waiting)s::text[]);
        SELECT check_bead_cycles(%(linked)s::text[]);
        SELECT jsonb_agg(as_json(b) ORDER BY b.created_at)::text AS beads FROM beads b WHERE b.id = ANY (%(keys)s)
        """,
        # blocked, adopted: existing beads that new ones block, and those that get a new parent.
        names=[f"bead:{other}" for other in {*blocked, *parents}],
        agents=sorted({bead["assigned_to"] for bead in new if bead.get("assigned_to")}),
        own_names=[f"bead:{bead['id']}" for bead in new],
        others=sorted({*blocked, *parents, *waiting, *waited_for}),
        waiting=sorted(waiting),
        waited_for=sorted(waited_for),
        blocked=list(blocked),
        adopted=list(parents),
        blockers=json.dumps(blocked),
        parents=json.dumps(parents),
        linked=linked,
        keys=[bead["id"] for bead in new],
        **params,
    )
    return msgspec.json.decode(row["beads"], type=list[Bead])


def _new_keys(conn: db.Connection, given: Sequence[dict[str, Any]]) -> list[str]:
    """An id for each, in their order; none that we make is one that another of them bears."""
    while True:
        rows = db.rows(
            conn,
            """
            SELECT COALESCE(b.id, new_bead_id(b.project_id)) AS id
              FROM unnest(%(ids)s::text[], %(projects)s::text[]) WITH ORDINALITY AS b (id, project_id, n) ORDER BY n
            """,
            ids=[bead.get("id") for bead in given],
            projects=[bead["project_id"] for bead in given],
        )
        keys = [row["id"] for row in rows]
        if len(set(keys)) == len(keys):
            return keys


def _normalise_links(beads: dict[str, dict[str, Any]], ids: dict[str, str]) -> None:
    """Replaces refs by ids, and `blocks` and `children` that name new beads by `blocked_by` and `parent` of those."""
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


def _waits_for(beads: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What each waits for: the beads in its `blocked_by`, and those of its children that are new, too."""
    found = {key: list(bead.get("blocked_by", ())) for key, bead in beads.items()}
    for key, bead in beads.items():
        if bead.get("parent") in found:
            found[bead["parent"]].append(key)
    return found


def _in_order(waits_for: Mapping[str, Sequence[str]]) -> list[str]:
    """The beads, each after those that it waits for. Raises graphlib.CycleError."""
    order = graphlib.TopologicalSorter(waits_for)
    return [key for key in order.static_order() if key in waits_for]


def _named(problem: Exception, given: Sequence[dict[str, Any]], refs: dict[str, str]) -> Exception:
    """The error with the caller's refs in place of new ids, and with the place of the bead in the list."""
    if isinstance(problem, errors.Cycle):
        return refusals.error("cycle", {"cycle": [refs.get(key, key) for key in problem.members["cycle"]]})
    if isinstance(problem, errors.Invalid):
        for error in problem.members.get("errors", ()):
            for place, bead in enumerate(given):
                value = bead.get(error["field"])
                if error.get("value") in (value if isinstance(value, list) else [value]):
                    return errors.Invalid.field(f"beads[{place}].{error['field']}", error["problem"])
    return problem
