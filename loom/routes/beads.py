"""/api/v1/beads: units of work. Claims are in routes/claims.py."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from flask import Response
from msgspec import UNSET, Meta, UnsetType

from loom import db, errors
from loom.bounds import bounds
from loom.http import answer, entities, headers, idempotency, parse
from loom.http.parse import Key, Name
from loom.state import beads, comments
from loom.state.beads import Bead
from loom.state.comments import Comment
from loom.state.entities import get

CLAIM = ("fencing_token", "claimed_at", "lease_seconds", "lease_expires_at")
RESERVED = ("bulk", "claim")  # the ends of paths below /api/v1/beads
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
    beads: Annotated[list[NewBead], Meta(min_length=1, max_length=bounds.bulk)]


def _adapt(patch: dict[str, Any], key: str | None) -> None:
    """Turns empty ids into None, and removes duplicates from lists. Raises Invalid for an id that is a path of ours."""
    if key is None and patch.get("id") in RESERVED:
        raise errors.Invalid.field("id", "is reserved: choose another")
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
    for n, bead in enumerate(given):
        parse.one_form(bead.get("id", ""), f"beads[{n}].id")
        _adapt(bead, None)
    return idempotency.once(lambda conn: answer.json(beads.create_many(conn, writer, given), 201), in_transaction=True)


class BeadRemark(entities.Body):
    content: str = ""
    parent_id: Annotated[str, Meta(max_length=200)] | None = None
    author_id: parse.Actor | None = None


@bp.get("/<key>/comments")
@parse.query(*parse.PAGE)
def remarks(key: str) -> Response:
    key, after, limit = parse.key(key), parse.cursor(comments.Place), answer.page_limit()
    with db.connection() as conn:
        get(conn, Bead, key)
        page = comments.some(conn, Comment, key, after=after, limit=limit)
        found = list(page)
        response = answer.json({"bead_id": key, "comments": comments.threads(found)})
    return answer.linked(response, limit, comments.place_of(found[-1])) if page.more else response


@bp.post("/<key>/comments")
def remark(key: str) -> Response:
    body = parse.body(BeadRemark, required=("content",))
    writer = headers.writer(f"bead:{parse.key(key)}", body.author_id or None)
    return idempotency.once(
        lambda conn: answer.json(comments.on_bead(conn, writer, key, body.content, body.parent_id or None), 201),
        in_transaction=True,
    )
