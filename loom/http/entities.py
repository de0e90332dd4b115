"""The routes that every kind of shared state has: list, read, create, change, delete. Each kind adds its own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timezone
from functools import partial
from typing import Any, NamedTuple

import msgspec
from flask import Blueprint, Response, request
from msgspec import UNSET, UnsetType

from loom import db, errors
from loom.bounds import bounds
from loom.http import answer, headers, idempotency, parse
from loom.http.parse import Count, Key, Keys, Reference, Tags
from loom.state import entities, events
from loom.state.entities import Action, Id, Versioned

# For types of an entity's fields: the type that a client's value must have.
WRITTEN: dict[Any, Any] = {
    Id: Key,
    Id | None: Reference,
    list[Id]: Keys,
    list[str]: Tags,
    int: Count,
    int | None: Count | None,
}


class Body(msgspec.Struct, kw_only=True):
    """The fields of an entity that a client may write; a field that is absent is not changed."""


def body_of(entity: type[Versioned], doc: str = "", *, without: Collection[str] = (), **types: Any) -> type[Body]:
    """A Body with the fields of an entity except those in `without`.

    The type of a field is that in `types`, else that in WRITTEN, else the entity's own. `types` may add fields.
    """
    read_only = {*without, *Versioned.__struct_fields__}
    own = {f.name: WRITTEN.get(f.type, f.type) for f in msgspec.structs.fields(entity) if f.name not in read_only}
    fields = [(name, hint | UnsetType, UNSET) for name, hint in {**own, **types}.items()]
    name, namespace = f"{entity.__name__}Body", {"__doc__": doc or Body.__doc__}
    return msgspec.defstruct(name, fields, bases=(Body,), module=__name__, namespace=namespace)  # type: ignore


class Kind(NamedTuple):
    """How the HTTP interface of one kind of entity differs from that of the others."""

    entity: type[Versioned]
    body: type[Body]
    required: tuple[str, ...]  # fields of a new entity
    filters: tuple[str, ...]  # of the list; `a,b` matches either
    original: frozenset[str]  # methods of routes that the original has; they ignore unknown keys
    create: Action = "create"
    # Changes a patch in place before it is written; arguments: the patch, and the id (None for a new entity).
    adapt: Callable[[dict[str, Any], str | None], None] = lambda patch, key: None

    @property
    def name(self) -> str:
        return self.entity.kind


def blueprint(kind: Kind) -> Blueprint:
    """The routes under /api/v1/<kind>s."""
    bp = Blueprint(kind.name + "s", __name__, url_prefix=f"/api/v1/{kind.name}s")
    for rule, view, methods, query in (
        ("", some, ["GET"], (*parse.PAGE, *kind.filters)),
        ("", create, ["POST"], ()),
        ("/<key>", one, ["GET"], ()),
        ("/<key>", change, ["PUT", "PATCH"], ()),
        ("/<key>", delete, ["DELETE"], ()),
        ("/<key>/history", history, ["GET"], parse.PAGE),
    ):
        bp.add_url_rule(rule, view.__name__, parse.query(*query)(partial(view, kind)), methods=methods)
    return bp


def some(kind: Kind) -> Response:
    filters = {}
    for column in kind.filters:
        value = parse.text(column, 10_000)
        if value:
            filters[column] = value.split(",")
            if len(filters[column]) > bounds.filter:
                raise errors.Invalid.field(column, f"must have at most {bounds.filter} values")
            few = parse.allowed(kind.entity).get(column)
            if few and not set(few).issuperset(filters[column]):
                raise errors.Invalid.field(column, f"must be among {', '.join(few)}", allowed=few)
    after = parse.cursor(str)
    with db.connection() as conn:
        return answer.page(
            lambda limit: entities.some(conn, kind.entity, filters=filters, after=after, limit=limit),
            entities.key_of,
        )


def one(kind: Kind, key: str) -> Response:
    key, conditions = parse.key(key), headers.conditions()
    with db.connection() as conn:
        found = entities.get(conn, kind.entity, key)
        entities.check_read(conn, found, conditions.if_match)
    if conditions.if_none_match is not None and entities.matches(found, conditions.if_none_match):
        return tagged(Response(status=304), found)
    return versioned(found)


def create(kind: Kind) -> Response:
    patch = given(kind, None)
    absent = [field for field in kind.required if not patch.get(field)]
    if absent:
        raise parse.missing(*absent)
    key = patch.pop("id", None)
    writer, conditions = headers.writer(f"{kind.name}:{key or ''}"), headers.conditions()

    def work(conn: db.Connection) -> Response:
        made = entities.change(conn, writer, kind.entity, key, kind.create, patch, conditions=conditions)
        return versioned(made, 201)

    return idempotency.once(work)


def change(kind: Kind, key: str) -> Response:
    key, action = parse.key(key), request.method.lower()
    patch = given(kind, key)
    patch.pop("id", None)
    writer, conditions = headers.writer(f"{kind.name}:{key}"), headers.conditions()
    with db.connection() as conn:
        done = entities.change(
            conn,
            writer,
            kind.entity,
            key,
            action,  # type: ignore[arg-type]
            patch,
            conditions=conditions,
            merge=action == "patch" and "conflict=merge" in request.headers.get("Prefer", ""),
        )
    return versioned(done)


def delete(kind: Kind, key: str) -> Response:
    key = parse.key(key)
    writer, conditions = headers.writer(f"{kind.name}:{key}"), headers.conditions()
    with db.connection() as conn:
        entities.delete(conn, writer, kind.entity, key, conditions)
    return answer.nothing()


def history(kind: Kind, key: str) -> Response:
    """The events of one entity, newest first."""
    key, before = parse.key(key), parse.cursor(int)
    with db.connection() as conn:
        return answer.page(
            lambda limit: events.history(conn, kind.name, key, before=before, limit=limit),
            lambda entry: entry.place,
            lambda entry: entry.event,
        )


def given(kind: Kind, key: str | None) -> dict[str, Any]:
    """The request's patch, checked and adapted, without read-only keys."""
    known = None
    if request.method not in kind.original:
        known = {*kind.body.__struct_fields__, *kind.entity.__struct_fields__}
    body = parse.body(kind.body, known)
    patch = written(body)
    if "id" in patch:
        parse.one_form(patch["id"], "id")
    kind.adapt(patch, key)
    return patch


def written(body: Body) -> dict[str, Any]:
    """The fields that are present in a body. Raises Invalid for a time outside the years 1 to 9999 in UTC."""
    patch = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not UNSET}
    for name, value in patch.items():
        if isinstance(value, datetime):
            try:
                patch[name] = value.astimezone(timezone.utc)
            except OverflowError:
                raise errors.Invalid.field(name, "is not within the years 1 to 9999 in UTC") from None
    return patch


def drop_empty_name(patch: dict[str, Any]) -> None:
    """An empty name is none in the original's POST and PUT; a PATCH cannot clear a name."""
    if patch.get("name") == "":
        if request.method == "PATCH":
            raise errors.Invalid.field("name", "must not be empty")
        del patch["name"]


def versioned(entity: Versioned, status: int = 200) -> Response:
    return tagged(answer.json(entity, status), entity)


def tagged(response: Response, entity: Versioned) -> Response:
    """The response, with the entity's version as its ETag."""
    response.set_etag(str(entity.version))
    return response
