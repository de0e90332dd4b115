"""What providers, projects, agents, beads and config have in common: versions, conflicts, changes in one round trip."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, NewType, TypeVar

import msgspec
import psycopg2

from loom import db, errors, refusals
from loom.db import Time
from loom.state.writer import Writer, call

E = TypeVar("E", bound="Versioned")
Id = NewType("Id", str)  # of an entity
Versions = Sequence[int] | Literal["*"]  # "*": any
Action = Literal["create", "upsert", "put", "patch", "delete"]

MAX_SEARCHES = 64  # of an index, for one page of a list
STEP_SECONDS = 0.5  # a further step of a deletion is begun when so much time is left
MAX_ATTEMPTS = 1000  # to find an id that is free


_CLEARED = {"projects": ("beads", "agents")}  # tables whose rows a deletion changes or deletes along with it


class _InSteps(Exception):
    """Too many others change with a deletion for one transaction."""


class Steps(NamedTuple):
    """A kind's part of a change, in SQL: what enters it, and what follows when the row is written."""

    enter: str
    after: str = ""
    params: Mapping[str, Any] = {}


class Versioned(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One piece of shared state, as it is answered. What has a default is left out when it is empty."""

    kind: ClassVar[str]  # its name in events and automatic locks
    table: ClassVar[str]
    key_column: ClassVar[str] = "id"
    new_id: ClassVar[str] = ""  # SQL that makes one; %(suffix)s tells it from those that were taken
    derived: ClassVar[frozenset[str]] = frozenset()  # fields that can be written and have no column
    statuses: ClassVar[tuple[str, ...]] = ()  # if lists are searched by status
    indexed: ClassVar[tuple[str, ...]] = ()  # columns with an index (column, status, id), the most selective first
    together: ClassVar[Mapping[str, str]] = {}  # column -> one that an UPDATE of it names, too, for the triggers
    conditions: ClassVar[Mapping[str, str]] = {}  # of further filters; %(filter)s is a list

    version: int
    created_at: Time
    updated_at: Time

    @classmethod
    def steps(cls, key: str, action: Action, patch: Mapping[str, Any]) -> Steps:
        """What a change of this kind does besides writing the row. key: SQL."""
        return Steps(enter(key))


def enter(key: str, names: str = "'{}'") -> str:
    """The statement that enters a change, in SQL. names: an array of further automatic locks."""
    return f"SELECT enter_change(%(kind)s, {key}, {names}, %(deletes)s, %(fences)s)"


class Entity(Versioned, kw_only=True):
    """Shared state with an id."""

    id: Id
    attributes: dict[str, Any] = {}


class Conditions(msgspec.Struct, frozen=True):
    """What must hold of the current version (RFC 9110): it is one of `if_match`, and none of `if_none_match`."""

    if_match: Versions | None = None
    if_none_match: Versions | None = None


UNCONDITIONAL = Conditions()


def get(conn: db.Connection, kind: type[E], key: str) -> E:
    """One entity. Raises NotFound."""
    row = db.one(conn, f"SELECT as_json(t)::text AS it FROM {kind.table} t WHERE {kind.key_column} = %(key)s", key=key)
    if row is None:
        raise not_found(kind, key)
    return msgspec.json.decode(row["it"], type=kind)


def some(
    conn: db.Connection, kind: type[E], *, filters: Mapping[str, Sequence[str]], after: str | None, limit: int
) -> db.Page[E]:
    """Entities in the order of their ids, those after `after` only; of each filtered column, one of the values.

    A page costs the same wherever it is and however few entities are left: the best index is searched once for each of
    its combinations of values, and then the pages that were found are merged. With very many combinations, all rows
    are read in the order of ids.

    What meets the kind's `conditions` is looked for among the rows that the other filters leave: 50 ms a page when none
    of 200,000 beads has the tag. A GIN index would be written by each claim, and did not help: for a page of 100 rows
    PostgreSQL still went by ids.
    """
    params = {name: list(dict.fromkeys(values)) for name, values in filters.items()}
    where = [kind.conditions.get(name, f"{name} = ANY (%({name})s)") for name in params]
    if kind.statuses and not kind.conditions.keys() >= params.keys():
        params.setdefault("status", list(kind.statuses))
    index = [*[column for column in kind.indexed if column in params][:1], "status"]
    if not kind.statuses or "status" not in params or math.prod(len(params[column]) for column in index) > MAX_SEARCHES:
        index = []
    searches = (
        ", ".join(f"unnest(%({column})s::text[]) AS wanted_{column}" for column in index) or "(VALUES (1)) AS once"
    )
    columns, wanted = ", ".join([*index, kind.key_column]), ", ".join(f"wanted_{column}" for column in index)
    if index:
        # Not by `=`: else PostgreSQL may choose the primary key and read all rows with smaller ids.
        where = [each for each in where if each.partition(" ")[0] not in index]
        where += [f"({', '.join(index)}) <= ({wanted})", *(f"{column} IS NOT NULL" for column in index)]
    where.append(f"({columns}) > ({', '.join([*([wanted] if wanted else []), '%(after)s'])})")
    # First the keys of the page, and each row only when it comes to it: they may be large, and the page end before.
    sql = f"""
        SELECT (SELECT as_json(t)::text FROM {kind.table} t WHERE t.{kind.key_column} = found.key) FROM (
            SELECT key FROM {searches}
             CROSS JOIN LATERAL (SELECT {kind.key_column} AS key FROM {kind.table} t WHERE {" AND ".join(where)}
                                  ORDER BY {columns} LIMIT %(most_rows)s + 1) AS page
             ORDER BY key LIMIT %(most_rows)s + 1) AS found ORDER BY key
        """
    return db.Page(conn, kind, sql, limit, **params, after=after or "")


def change(
    conn: db.Connection,
    writer: Writer,
    kind: type[E],
    key: str | None,
    action: Action,
    patch: Mapping[str, Any],
    *,
    conditions: Conditions = UNCONDITIONAL,
    merge: bool = False,
) -> E:
    """Changes one entity, in one round trip, and returns it; loom/sql/entities.sql says how.

    patch: the new values. 'put' replaces those given, 'patch' merges objects as a JSON merge patch does.
    merge: changes of other fields since the versions of If-Match do no harm.
    Raises NotFound, Taken, Stale, LockHeld, LockLost, Cycle, ProjectClosed, and Invalid for an unknown reference.
    """
    for attempt in range(1, MAX_ATTEMPTS):
        try:
            return _change(conn, writer, kind, key, action, patch, conditions, merge, attempt)
        except errors.Taken:
            if key is not None:
                raise
    raise errors.Taken()


def delete(
    conn: db.Connection, writer: Writer, kind: type[E], key: str, conditions: Conditions = UNCONDITIONAL
) -> None:
    """Deletes one entity: in one round trip, or in steps that each commit if that changes too many others.

    Raises NotFound, Stale, LockHeld, LockLost, InUse, and Unfinished if some steps are left at the end of the time.
    """
    while True:
        try:
            _change(conn, writer, kind, key, "delete", {}, conditions)
            return
        except _InSteps:
            _clear(conn, writer, kind, key)
        except psycopg2.DatabaseError as exc:
            if exc.pgcode not in ("23503", "23001"):  # a foreign key that refers to it
                raise
            if exc.diag.table_name not in _CLEARED.get(kind.table, ()):
                raise refusals.error("in-use", {"used_by": exc.diag.table_name}) from exc
            # written since the last step


def _clear(conn: db.Connection, writer: Writer, kind: type[E], key: str) -> None:
    """Changes what refers to an entity that is to be deleted, step by step."""
    while left := call(
        conn, writer, "SELECT clear_step(%(kind)s, %(key)s, %(fences)s) AS left", kind=kind.kind, key=key
    )["left"]:
        if conn.deadline - time.monotonic() < STEP_SECONDS:
            raise errors.Unfinished(f"{left} more entities that refer to it must be changed first: send it again.")


def _change(
    conn: db.Connection,
    writer: Writer,
    kind: type[E],
    key: str | None,
    action: Action,
    patch: Mapping[str, Any],
    conditions: Conditions,
    merge: bool = False,
    attempt: int = 1,
) -> Any:
    name = "%(key)s" if key is not None else kind.new_id
    steps = kind.steps(name, "create" if key is None else action, patch)
    row_lock = "UPDATE" if action == "delete" else "NO KEY UPDATE"
    written = write(kind, action, patch)
    # An UPDATE without conditions locks the row itself: the check would make it a tenth slower.
    unchecked = action in ("put", "patch") and conditions == UNCONDITIONAL and written and not steps.after
    statements = [
        steps.enter,
        "SELECT refuse_foreign_change(%(kind)s, entered(), %(creates)s, %(linked)s)" if writer.restricted else "",
        ""
        if unchecked
        else f"""
        SELECT check_change(%(kind)s, %(action)s,
            (SELECT version FROM {kind.table} WHERE {kind.key_column} = entered() FOR {row_lock}),
            %(if_match)s, %(if_none_match)s, %(merges)s)
        """,
        "SELECT refuse_change('in-steps') WHERE needs_steps(%(kind)s, entered())" if action == "delete" else "",
        written,
        steps.after,
        f"""
        SELECT refusal() ->> 'outcome' AS outcome, refusal() -> 'detail' AS detail,
               (SELECT as_json(t)::text FROM {kind.table} t
                 WHERE {kind.key_column} = COALESCE(entered(), %(key)s)) AS entity
        """,
    ]
    row = call(
        conn,
        writer,
        "; ".join(statement for statement in statements if statement),
        kind=kind.kind,
        key=key,
        suffix="" if attempt == 1 else f"-{attempt}",
        action="create" if key is None else action,
        deletes=action == "delete",
        creates=action == "create" or key is None,
        linked=[*(patch.get("blocks") or ()), *(patch.get("children") or ())],
        if_match=_json(conditions.if_match),
        if_none_match=_json(conditions.if_none_match),
        merges=list(patch) if merge else None,
        **{**values(patch), **steps.params},
    )
    if row["outcome"] == "in-steps":
        raise _InSteps
    entity = None if row["entity"] is None else msgspec.json.decode(row["entity"], type=kind)
    if row["outcome"] == "not-found" or (unchecked and entity is None):
        raise not_found(kind, key or "")
    if row["outcome"] == "stale":
        changed = row["detail"]
        conflicting = sorted(set(patch) & set(changed)) if merge and changed is not None else None
        raise stale(kind, entity, changed, **({} if conflicting is None else {"conflicting": conflicting}))
    if row["outcome"] == "there":
        raise errors.Stale(
            f"The {kind.kind} is there, and If-None-Match excludes its version.",
            current=entity,
            changed=None,
            changed_by=None,
        )
    return entity


def write(kind: type[Versioned], action: Action, patch: Mapping[str, Any]) -> str:
    """The statement that writes the row, in SQL; nothing, if the patch has no columns."""
    columns = [column for column in patch if column not in kind.derived]
    merged = [column for column in columns if action == "patch" and isinstance(patch[column], dict)]
    new = {column: f"%({column})s" for column in columns}
    new |= {column: f"merge_patch({column}, %({column})s)" for column in merged}
    touched = {other: other for column, other in kind.together.items() if column in new}
    updated = ", ".join(f"{column} = {value}" for column, value in {**touched, **new}.items())
    if action == "delete":
        return f"DELETE FROM {kind.table} WHERE {kind.key_column} = entered()"
    if action in ("create", "upsert"):
        names = ", ".join([kind.key_column, "created_at", "updated_at", *new])
        existing = f"DO UPDATE SET {updated}" if updated else "DO NOTHING"
        conflict = f"ON CONFLICT ({kind.key_column}) {existing}" if action == "upsert" else ""
        return f"""
            INSERT INTO {kind.table} ({names}) SELECT {", ".join(["entered()", "t", "t", *new.values()])}
              FROM clock_timestamp() AS t WHERE entered() IS NOT NULL {conflict}
            """
    return f"UPDATE {kind.table} SET {updated} WHERE {kind.key_column} = entered()" if updated else ""


def values(patch: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a patch as parameters: objects, and what is JSON already, as JSON."""
    return {
        name: msgspec.json.encode(value).decode() if isinstance(value, dict | msgspec.Raw) else value
        for name, value in patch.items()
    }


def check_read(conn: db.Connection, entity: Versioned, if_match: Versions | None) -> None:
    """Raises Stale when an entity that was read has no version of If-Match."""
    if if_match is None or matches(entity, if_match):
        return
    changed = db.value(
        conn,
        "SELECT changes_since(%(kind)s, %(key)s, %(since)s, %(until)s)",
        kind=entity.kind,
        key=key_of(entity),
        since=max(int(version) for version in if_match),
        until=entity.version,
    )
    raise stale(type(entity), entity, changed)


def matches(entity: Versioned, versions: Versions) -> bool:
    """As version_matches() of loom/sql/entities.sql, for an entity that exists."""
    return versions == "*" or entity.version in versions


def stale(
    kind: type[Versioned], entity: Versioned | None, changed: Mapping[str, str] | None, **members: Any
) -> errors.Stale:
    """What If-Match refused. changed: which fields others have changed since, and who each."""
    name = kind.kind
    detail = f"The {name} has changed since the version in If-Match."
    return errors.Stale(
        detail if entity else f"There is no such {name}, and If-Match requires one.",
        current=entity,
        changed=None if changed is None else sorted(changed),
        changed_by=changed,
        **members,
    )


def _json(versions: Versions | None) -> str | None:
    return None if versions is None else msgspec.json.encode(versions).decode()


def key_of(entity: Versioned) -> str:
    return getattr(entity, entity.key_column)


def not_found(kind: type[Versioned], key: str) -> errors.NotFound:
    return errors.NotFound(f"{kind.__name__} not found", id=key)
