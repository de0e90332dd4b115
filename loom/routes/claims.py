"""/api/v1/beads/claim, /api/v1/beads/{id}/claim, the routes that end a claim, and the heartbeat of agents."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from flask import Blueprint, Response
from msgspec import Meta

from loom import db
from loom.http import answer, entities, headers, idempotency, parse
from loom.http.parse import Key, Token
from loom.state import claims
from loom.state.writer import Writer

bp = Blueprint("claims", __name__, url_prefix="/api/v1")

LeaseSeconds = Annotated[int, Meta(ge=10, le=86400)]  # seconds
Labels = Annotated[list[Annotated[str, Meta(max_length=255)]], Meta(max_length=100)]
Reason = Annotated[str, Meta(max_length=10_000)]


class ClaimNext(parse.Body):
    """Filters: the bead's type is one of `types`, and it has all of `tags`."""

    agent_id: Key
    lease_seconds: LeaseSeconds = 1800
    project_id: Key | None = None
    types: Labels = []
    tags: Labels = []


class ClaimBead(msgspec.Struct):
    agent_id: Key
    lease_seconds: LeaseSeconds = 1800


class RenewClaim(parse.Body):
    """Without `lease_seconds`, the lease is extended by the claim's own."""

    fencing_token: Token
    lease_seconds: LeaseSeconds | None = None


class Complete(parse.Body):
    fencing_token: Token
    close_reason: Reason | None = None
    context: dict[str, Any] | None = None


class Fail(parse.Body):
    """Without `retry_after_seconds`, the delay depends on the number of failures."""

    fencing_token: Token
    reason: Reason | None = None
    retry_after_seconds: Annotated[int, Meta(ge=0, le=86400)] | None = None


class Heartbeat(msgspec.Struct):
    """`claims`: the beads that the agent still works on, each with its fencing token."""

    claims: Annotated[dict[str, Token], Meta(max_length=1000)] = {}
    status: Literal["paused", "idle", "working", "deciding", "blocked"] | None = None


class Redispatch(msgspec.Struct):
    reason: Reason | None = None


def _extended(writer: Writer, conn: db.Connection, first: dict[str, Any]) -> claims.Claim:
    """The claim of this request's first answer, extended. Raises ClaimLost when it has ended."""
    lease = timedelta(seconds=first["bead"]["lease_seconds"])
    return claims.renew(conn, writer, first["bead"]["id"], first["fencing_token"], lease, extend=True)


@bp.post("/beads/claim")
def claim_next() -> Response:
    body = parse.body(ClaimNext)
    writer = headers.writer(f"agent:{body.agent_id}", body.agent_id)

    def work(conn: db.Connection) -> Response:
        claim = claims.claim_next(
            conn,
            writer,
            body.agent_id,
            timedelta(seconds=body.lease_seconds),
            project=body.project_id,
            types=body.types,
            tags=body.tags,
        )
        return answer.nothing() if claim is None else answer.json(claim)

    return idempotency.once(work, refresh=partial(_extended, writer))


@bp.post("/beads/<key>/claim")
def claim(key: str) -> Response:
    key, body = parse.key(key), parse.body(ClaimBead)
    writer = headers.writer(f"bead:{key}", body.agent_id)

    def work(conn: db.Connection) -> Response:
        lease = timedelta(seconds=body.lease_seconds)
        return answer.json(claims.claim(conn, writer, key, body.agent_id, lease))

    return idempotency.once(work, refresh=partial(_extended, writer))


@bp.put("/beads/<key>/claim")
def renew(key: str) -> Response:
    key, body = parse.key(key), parse.body(RenewClaim)
    lease = None if body.lease_seconds is None else timedelta(seconds=body.lease_seconds)
    with db.connection() as conn:
        return answer.json(claims.renew(conn, headers.writer(f"bead:{key}"), key, body.fencing_token, lease))


@bp.delete("/beads/<key>/claim")
@parse.query("fencing_token", "reason")
def release(key: str) -> Response:
    key, token = parse.key(key), parse.integer("fencing_token", most=parse.MAX_TOKEN)
    reason, writer = parse.text("reason", 1000), headers.writer(f"bead:{key}")
    with db.connection() as conn:
        claims.end(conn, writer, key, token, "released", reason)
    return answer.nothing()


@bp.post("/beads/<key>/complete")
def complete(key: str) -> Response:
    key, body = parse.key(key), parse.body(Complete)
    return _ended(key, body.fencing_token, "completed", body.close_reason, context=body.context)


@bp.post("/beads/<key>/fail")
def fail(key: str) -> Response:
    key, body = parse.key(key), parse.body(Fail)
    after = None if body.retry_after_seconds is None else timedelta(seconds=body.retry_after_seconds)
    return _ended(key, body.fencing_token, "failed", body.reason, retry_after=after)


def _ended(key: str, token: int, how: claims.Ending, why: str | None, **more: Any) -> Response:
    writer = headers.writer(f"bead:{key}")
    return idempotency.once(lambda conn: entities.versioned(claims.end(conn, writer, key, token, how, why, **more)))


@bp.post("/beads/<key>/redispatch")
def redispatch(key: str) -> Response:
    """Opens the bead again; its holder loses it."""
    key, body = parse.key(key), parse.body(Redispatch)
    writer, reason = headers.writer(f"bead:{key}"), body.reason or ""
    return idempotency.once(lambda conn: entities.versioned(claims.redispatch(conn, writer, key, reason)))


@bp.post("/agents/<key>/heartbeat")
def heartbeat(key: str) -> Response:
    """A retry is another heartbeat, since the first answer about the claims may no longer be true."""
    key, body = parse.key(key), parse.body(Heartbeat)
    writer = headers.writer(f"agent:{key}", key)

    def beat(conn: db.Connection, first: object = None) -> claims.HeartbeatResult:
        return claims.heartbeat(conn, writer, key, body.claims, body.status)

    return idempotency.once(lambda conn: answer.json(beat(conn)), refresh=beat)
