"""/api/v1/beads: units of work. Claims are in routes/claims.py."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from flask import Response
from msgspec import UNSET, Meta, UnsetType

from loom import db, errors
from loom.http import answer, entities, headers, idempotency, parse
from loom.http.parse import Key, Name
from loom.state import beads, comments
from loom.state.beads import Bead

CLAIM = ("fencing_token", "claimed_at", "lease_seconds", "lease_expires_at")
ENDS = ("attempts", "failures", "blocked_reason", "closed_at")  # written when a claim or the bead ends

BeadBody = entities.body_of(
    Bead,
    "`blocks` and `children` write `blocked_by` and `parent` of the beads that they name.",
    without=(*CLAIM, *ENDS),
    type=Annotated[str, Meta(min_length=1, max_length=64)],
    title=Name,
    priority=Annotated[int, Meta(ge=0, le=4)],
)


class NewBead(BeadBody, kw_only=True, forbid_unknown_fields=True):  # type: ignore
    """One bead of a bulk request; `ref` names it for the other beads of the request."""

    ref: Key | UnsetType = UNSET
    title: Name
    project_id: Key


class ManyBeads(parse.Body):
    beads: Annotated[list[NewBead], Meta(min_length=1, max_length=1000)]


def _adapt(patch: dict[str, Any], key: str | None) -> None:
    """Turns empty ids into None, and removes duplicates from lists."""
    for field in ("assigned_to", "parent", "milestone_id"):
        if patch.get(field) == "":
            patch[field] = None
    for field in ("blocked_by", "blocks", "children", "related_to"):
        if field in patch:
            patch[field] = list(dict.fromkeys(patch[field]))


KIND = entities.Kind(
    Bead,
    BeadBody,
    required=("title", "project_id"),
    filters=("project_id", "status", "type", "assigned_to", "tags"),
    original=frozenset({"POST", "PATCH"}),
    adapt=_adapt,
)
bp = entities.blueprint(KIND)


@bp.post("/bulk")
def create_many() -> Response:
    headers.no_conditions()
    writer = headers.writer(None)
    given = [entities.written(bead) for bead in parse.body(ManyBeads).beads]
    names = Counter(name for bead in given for name in {bead.get("ref"), bead.get("id")} - {None})
    for name, times in names.items():
        if times > 1:
            raise errors.Invalid.field("beads", f"{times} beads have the id or ref {name}")
    for bead in given:
        _adapt(bead, None)
    return idempotency.once(lambda conn: answer.json(beads.create_many(conn, writer, given), 201), in_transaction=True)


class BeadRemark(entities.Body):
    content: str = ""
    parent_id: Annotated[str, Meta(max_length=200)] | None = None
    author_id: parse.Actor | None = None


@bp.get("/<key>/comments")
def remarks(key: str) -> Response:
    with db.connection() as conn:
        return answer.json({"bead_id": key, "comments": comments.of_bead(conn, parse.key(key))})


@bp.post("/<key>/comments")
def remark(key: str) -> Response:
    body = parse.body(BeadRemark, required=("content",))
    writer = headers.writer(f"bead:{parse.key(key)}", body.author_id or None)
    return idempotency.once(
        lambda conn: answer.json(comments.on_bead(conn, writer, key, body.content, body.parent_id or None), 201),
        in_transaction=True,
    )
