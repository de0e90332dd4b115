"""/api/v1/keys: who may use the interface. Only administrators see them."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from flask import Blueprint, Response, request
from msgspec import Meta

from loom import db, errors
from loom.http import answer, auth, parse
from loom.state import keys

bp = Blueprint("keys", __name__, url_prefix="/api/v1/keys")


class CreateKey(parse.Body):
    """`principal`: who acts with the key. Without `expires_in_seconds` it is valid until it is revoked."""

    principal: keys.Principal
    role: keys.Role
    note: Annotated[str, Meta(max_length=1000)] = ""
    expires_in_seconds: keys.Seconds | None = None


class RotateKey(parse.Body):
    """`overlap_seconds`: for which the old key remains valid."""

    overlap_seconds: Annotated[int, Meta(ge=0, le=30 * 86400)] = int(keys.OVERLAP.total_seconds())


@bp.get("")
@parse.query(*parse.PAGE)
def some() -> Response:
    after = parse.cursor(str)
    with db.connection() as conn:
        return answer.page(lambda limit: keys.some(conn, after=after or "", limit=limit), lambda key: key.id)


@bp.get("/<key_id>")
def one(key_id: str) -> Response:
    with db.connection() as conn:
        return answer.json(keys.get(conn, parse.key(key_id)))


@bp.post("")
def create() -> Response:
    body = parse.body(CreateKey)
    lifetime = None if body.expires_in_seconds is None else timedelta(seconds=body.expires_in_seconds)
    _not_stored()
    with db.connection() as conn:
        made = keys.create(
            conn, body.principal, body.role, by=auth.caller().principal, note=body.note, lifetime=lifetime
        )
    return answer.json(made, 201)


@bp.post("/<key_id>/rotate")
def rotate(key_id: str) -> Response:
    body = parse.body(RotateKey)
    _not_stored()
    with db.transaction() as conn:
        made = keys.rotate(
            conn,
            parse.key(key_id),
            by=auth.caller().principal,
            overlap=timedelta(seconds=body.overlap_seconds),
        )
    return answer.json(made, 201)


@bp.delete("/<key_id>")
def revoke(key_id: str) -> Response:
    with db.transaction() as conn:
        keys.revoke(conn, parse.key(key_id), by=auth.caller().principal, keeps_admin=True)
    return answer.nothing()


def _not_stored() -> None:
    """Refuses an Idempotency-Key: the answer, and with it the key, would be stored for a day."""
    if "HTTP_IDEMPOTENCY_KEY" in request.environ:
        raise errors.Invalid.field("Idempotency-Key", "is not taken here: a new key is stored nowhere")
