"""What providers, projects, agents, beads and config have in common: versions, conflicts, changes in one round trip."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NewType, TypeVar

import msgspec
import psycopg2

from loom import db, errors, refusals
from loom.db import Time
from loom.state.writer import Writer, call

E = TypeVar("E", bound="Versioned")
Id = NewType("Id", str)  # of an entity
Versions = Sequence[int] | Literal["*"]  # "*": any
Action = Literal["create", "upsert", "put", "patch", "delete"]

MOST_PARTS = 64  # of a list's query


class Versioned(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One piece of shared state, as it is answered. What has a default is left out when it is empty."""

    statuses: ClassVar[tuple[str, ...]] = ()  # if lists are looked for by them
    orders: ClassVar[tuple[tuple[str, ...], ...]] = ()  # columns of its indexes before the id, the best first
    conditions: ClassVar[Mapping[str, str]] = {}  # of further filters; %(filter)s is a list

    version: int
    created_at: Time
    updated_at: Time


class Entity(Versioned, kw_only=True):
    """Shared state with an id."""

    id: Id
    attributes: dict[str, Any] = {}


class Conditions(msgspec.Struct, frozen=True):
    """What must hold of the current version (RFC 9110): it is one of `if_match`, and none of `if_none_match`."""

    if_match: Versions | None = None
    if_none_match: Versions | None = None


UNCONDITIONAL = Conditions()


class Change(msgspec.Struct):
    """What a change came to: 'created', 'updated', 'deleted', or 'repeated' when the proxy sent it again."""

    outcome: str
    entity: Any = None


def get(conn: db.Connection, kind: type[E], key: str) -> E:
    """One entity. Raises NotFound."""
    row = db.one(conn, f"SELECT as_json(t)::text AS it FROM {_table(kind)} t WHERE {_key(kind)} = %(key)s", key=key)
    if row is None:
        raise not_found(kind, key)
    return msgspec.json.decode(row["it"], type=kind)


def some(
    conn: db.Connection, kind: type[E], *, filters: Mapping[str, Sequence[str]], after: str | None, limit: int
) -> list[E]:
    """Entities in the order of their ids, those after `after` only; of each filtered column, one of the values.

    Each combination of values is looked for by itself, in the order of an index if the kind has one for it: so a page
    costs the same wherever it is and however few there are. Too many combinations are looked for in all rows.

    What meets the kind's `conditions` is looked for among the rows that the other filters leave: 50 ms a page when none
    of 200,000 beads has the tag. A GIN index would be written by each claim, and did not help: for a page of 100 rows
    PostgreSQL still went by ids.
    """
    table, key = _table(kind), _key(kind)
    conditions = [kind.conditions[name] for name in filters if name in kind.conditions]
    params: dict[str, Any] = {name: list(values) for name, values in filters.items() if name in kind.conditions}
    values = {column: list(dict.fromkeys(each)) for column, each in filters.items() if column not in params}
    if values and kind.statuses:
        values.setdefault("status", list(kind.statuses))
    order = next((each for each in kind.orders if set(each) <= set(values)), ())
    parts: list[tuple[str | list[str], ...]] = list(itertools.product(*values.values()))
    if len(parts) > MOST_PARTS:
        parts, order = [tuple(values.values())], ()
    params.update(after=after or "", limit=limit)
    selects = []
    for n, part in enumerate(parts):
        selects.append(_select(table, key, order, dict(zip(values, part, strict=True)), conditions, n))
        params.update((f"{column}_{n}", value) for column, value in zip(values, part, strict=True))
    found = f"SELECT * FROM ({' UNION ALL '.join(selects)}) AS parts ORDER BY {key} LIMIT %(limit)s"
    rows = db.rows(conn, f"SELECT as_json(it)::text AS it FROM ({found}) AS found ORDER BY {key}", **params)
    return [msgspec.json.decode(row["it"], type=kind) for row in rows]


def _select(
    table: str,
    key: str,
    order: Sequence[str],
    values: Mapping[str, str | list[str]],
    conditions: Sequence[str],
    n: int,
) -> str:
    """A page of those that have these values, and meet the conditions.

    Of the columns of `order` it is said without `=`: else PostgreSQL might go by ids, past all that come before.
    """
    given = {column: f"%({column}_{n})s" for column in values}
    where = [
        f"{column} = {given[column] if isinstance(value, str) else f'ANY ({given[column]})'}"
        for column, value in values.items()
        if column not in order
    ]
    where += conditions
    columns, bounds = ", ".join([*order, key]), ", ".join([*(given[column] for column in order), "%(after)s"])
    where += [f"{column} IS NOT NULL" for column in order]  # which an index may be restricted to
    where.append(f"({columns}) > ({bounds})")
    if order:
        where.append(f"({', '.join(order)}) <= ({', '.join(given[column] for column in order)})")
    return f"(SELECT t AS it, {key} FROM {table} t WHERE {' AND '.join(where)} ORDER BY {columns} LIMIT %(limit)s)"


def change(
    conn: db.Connection,
    writer: Writer,
    kind: type[E],
    key: str | None,
    action: Action,
    patch: Mapping[str, Any] | None = None,
    *,
    conditions: Conditions = UNCONDITIONAL,
    merge: bool = False,
) -> Change:
    """Changes one entity, in one round trip; the promises are kept in change_entity() of schema.sql.

    patch: the new values. 'put' replaces those given, 'patch' merges objects as a JSON merge patch does.
    merge: changes of other fields since the versions of If-Match do no harm.
    Raises NotFound, Taken, Stale, LockHeld, LockLost, Cycle, ProjectClosed, InUse, and Invalid for a reference to what
    is not there.
    """
    name = kind_name(kind)
    try:
        row = call(
            conn,
            writer,
            """
            SELECT outcome, entity::text AS entity, detail FROM change_entity(
                %(kind)s, %(key)s, %(action)s, %(patch)s, %(if_match)s, %(if_none_match)s, %(merge)s, %(fences)s)
            """,
            kind=name,
            key=key,
            action=action,
            patch=msgspec.json.encode(patch or {}).decode(),
            if_match=_json(conditions.if_match),
            if_none_match=_json(conditions.if_none_match),
            merge=merge,
        )
    except psycopg2.DatabaseError as exc:
        if action == "delete" and exc.pgcode in ("23503", "23001"):  # a foreign key that refers to it
            raise refusals.error("in-use", {"used_by": exc.diag.table_name}) from exc
        raise
    entity = None if row["entity"] is None else msgspec.json.decode(row["entity"], type=kind)
    if row["outcome"] == "not-found":
        raise not_found(kind, key or "")
    if row["outcome"] == "taken":
        raise refusals.error("taken", {"id": key})
    if row["outcome"] == "stale":
        changed = row["detail"]
        conflicting = sorted(set(patch or {}) & set(changed)) if merge and changed is not None else None
        raise stale(kind, entity, changed, **({} if conflicting is None else {"conflicting": conflicting}))
    if row["outcome"] == "there":
        raise errors.Stale(
            f"The {name} is there, and If-None-Match excludes its version.",
            current=entity,
            changed=None,
            changed_by=None,
        )
    return Change(row["outcome"], entity)


def check_read(conn: db.Connection, entity: Versioned, if_match: Versions | None) -> None:
    """Raises Stale when an entity that was read has no version of If-Match."""
    if if_match is None or matches(entity, if_match):
        return
    changed = db.value(
        conn,
        "SELECT changes_since(%(kind)s, %(key)s, %(since)s, %(until)s)",
        kind=kind_name(type(entity)),
        key=key_of(entity),
        since=max(int(version) for version in if_match),
        until=entity.version,
    )
    raise stale(type(entity), entity, changed)


def matches(entity: Versioned, versions: Versions) -> bool:
    """As version_matches() of schema.sql, for what is there."""
    return versions == "*" or entity.version in versions


def stale(
    kind: type[Versioned], entity: Versioned | None, changed: Mapping[str, str] | None, **members: Any
) -> errors.Stale:
    """What If-Match refused. changed: which fields others have changed since, and who each."""
    name = kind_name(kind)
    detail = f"The {name} has changed since the version in If-Match."
    return errors.Stale(
        detail if entity else f"There is no such {name}, and If-Match requires one.",
        current=entity,
        changed=None if changed is None else sorted(changed),
        changed_by=changed,
        **members,
    )


def _json(versions: Versions | None) -> str | None:
    return None if versions is None else json.dumps(versions)


def key_of(entity: Versioned) -> str:
    return getattr(entity, _key(type(entity)))


def kind_name(kind: type[Versioned]) -> str:
    return kind.__name__.lower().removeprefix("project") or "project"


def not_found(kind: type[Versioned], key: str) -> errors.NotFound:
    return errors.NotFound(f"{kind.__name__} not found", id=key)


def _table(kind: type[Versioned]) -> str:
    name = kind_name(kind)
    return name if name == "config" else name + "s"


def _key(kind: type[Versioned]) -> str:
    return "key" if kind_name(kind) == "config" else "id"
