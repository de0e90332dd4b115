"""/api/v1/beads: units of work. Claims are in http/claims.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from flask import Response
from msgspec import UNSET, Meta, UnsetType

from loom import db, errors
from loom.http import answer, entities, parse
from loom.http.parse import Key, Name, Time
from loom.state import beads, comments
from loom.state.beads import Bead

Keys = Annotated[list[Key], Meta(max_length=1000)]
Tags = Annotated[list[Annotated[str, Meta(max_length=255)]], Meta(max_length=1000)]


class BeadBody(entities.Body):
    """`blocks` and `children` write `blocked_by` and `parent` of the beads that they name."""

    id: Key | UnsetType = UNSET
    type: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    title: Name | UnsetType = UNSET
    description: str | UnsetType = UNSET
    status: Literal["open", "in_progress", "blocked", "closed"] | UnsetType = UNSET
    priority: Annotated[int, Meta(ge=0, le=3)] | UnsetType = UNSET
    project_id: Key | UnsetType = UNSET
    assigned_to: str | UnsetType | None = UNSET
    parent: str | UnsetType | None = UNSET
    children: Keys | UnsetType = UNSET
    blocked_by: Keys | UnsetType = UNSET
    blocks: Keys | UnsetType = UNSET
    related_to: Keys | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET
    context: dict[str, Any] | UnsetType = UNSET
    attributes: dict[str, Any] | UnsetType = UNSET
    due_date: Time | UnsetType | None = UNSET
    milestone_id: str | UnsetType | None = UNSET
    estimated_time: Annotated[int, Meta(ge=0, le=2**53 - 1)] | UnsetType | None = UNSET
    close_reason: str | UnsetType | None = UNSET


class NewBead(BeadBody, kw_only=True):
    """One of several: `ref` names it for the others."""

    ref: Key | UnsetType = UNSET
    title: Name
    project_id: Key


class ManyBeads(parse.Body):
    beads: Annotated[list[NewBead], Meta(min_length=1, max_length=1000)]


def _adapt(patch: dict[str, Any], key: str | None) -> None:
    for field in ("assigned_to", "parent"):
        if patch.get(field) == "":
            patch[field] = None


KIND = entities.Kind(
    Bead,
    BeadBody,
    required=("title", "project_id"),
    filters=("project_id", "status", "type", "assigned_to"),
    original=frozenset({"POST", "PATCH"}),
    adapt=_adapt,
)
bp = entities.blueprint(KIND)


@bp.post("/bulk")
def create_many() -> Response:
    body, writer = parse.body(ManyBeads), parse.writer("")
    given = [msgspec.to_builtins(bead) for bead in body.beads]
    names = [bead["ref"] for bead in given if "ref" in bead] + [bead["id"] for bead in given if "id" in bead]
    for name in names:
        if names.count(name) > 1:
            raise errors.Invalid.field("beads", f"{name} names two of them")
    for bead in given:
        _adapt(bead, None)
    with db.transaction() as conn:
        return answer.json(beads.create_many(conn, writer, given), 201)


class Remark(entities.Body):
    content: str = ""
    parent_id: str | None = None
    author_id: str | None = None


@bp.get("/<key>/comments")
def remarks(key: str) -> Response:
    with db.connection() as conn:
        return answer.json({"bead_id": key, "comments": comments.of_bead(conn, parse.key(key))})


@bp.post("/<key>/comments")
def remark(key: str) -> Response:
    body = parse.body(Remark)
    if not body.content:
        raise errors.Invalid.field("content", "is required")
    with db.transaction() as conn:
        writer = parse.writer(f"bead:{parse.key(key)}", body.author_id)
        return answer.json(comments.on_bead(conn, writer, key, body.content, body.parent_id or None), 201)
