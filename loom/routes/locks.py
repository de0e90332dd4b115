"""/api/v1/locks: acquire, renew, release, force-release, inspect."""

from __future__ import annotations

import uuid
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, cast

import msgspec
from flask import Blueprint, Response
from msgspec import Meta

from loom import db, errors, instances, locks
from loom.bounds import bounds
from loom.http import answer, idempotency, parse, problems
from loom.http.pollers import pollers, wait, waited
from loom.locks.queue import LockWaiter

bp = Blueprint("locks", __name__, url_prefix="/api/v1/locks")

RESERVED_OWNER = "instance:"  # the owner of locks that an instance holds for itself
RESERVED_NAME = "loom:"  # of those locks

Ttl = Annotated[int, Meta(ge=1, le=86400)]


class AcquireLock(parse.Body):
    """`wait_seconds` > 0 takes a place in the queue."""

    owner: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    ttl_seconds: Ttl = 30
    wait_seconds: Annotated[int, Meta(ge=0, le=30)] = 0
    metadata: dict[str, Any] | None = None


class RenewLock(parse.Body):
    fencing_token: parse.Token
    ttl_seconds: Ttl = 30


@bp.post("/<name:_>")
def acquire(_: str) -> Response:
    """Tries to acquire the lock. With `wait_seconds`, it is run again when it is its turn, and a last time at the end.

    A grant is never taken back, since another request of the same owner may have been answered with it. If the client
    has hung up, the grant expires, as if its holder had crashed.
    """
    name, body = _name(), parse.body(AcquireLock)
    owner, ttl = _owner(body.owner), timedelta(seconds=body.ttl_seconds)
    if body.metadata is not None and len(msgspec.json.encode(body.metadata)) > bounds.lock_metadata:
        raise errors.Invalid.field("metadata", f"must have at most {bounds.lock_metadata} bytes")

    def ask(conn: db.Connection) -> Response:
        attempt = locks.acquire(
            conn,
            name,
            owner,
            ttl,
            instance_id=instances.own_id(),
            metadata=body.metadata,
            wait=body.wait_seconds > 0,
        )
        if attempt.granted:
            return answer.json(attempt.grant, 201 if attempt.outcome == "new" else 200)
        # Returned, not raised: an exception would roll back the place in the queue.
        return problems.answer(
            errors.LockHeld(
                "The lock is promised to a waiter." if attempt.grant is None else None,
                lock_name=name,
                owner=owner,
                holder=attempt.grant,
                waiting=attempt.waiting,
            )
        )

    def extended(conn: db.Connection, first: dict[str, Any]) -> locks.Grant:
        """The grant of this request's first answer, extended. Raises LockLost when it has ended."""
        return locks.renew(conn, name, first["fencing_token"], ttl, extend=True)

    response = idempotency.once(ask, refresh=extended, wait=True)
    if response.status_code == errors.LockHeld.status:
        wait(pollers().locks, partial(LockWaiter, name, owner), body.wait_seconds)
    return response


@bp.put("/<name:_>")
def renew(_: str) -> Response:
    name, body = _name(), parse.body(RenewLock)
    with db.connection() as conn:
        return answer.json(locks.renew(conn, name, body.fencing_token, timedelta(seconds=body.ttl_seconds)))


@bp.delete("/<name:_>")
@parse.query("fencing_token", "force", "reason")
def release(_: str) -> Response:
    name, token, force = _name(), parse.integer("fencing_token", most=parse.MAX_TOKEN), parse.flag("force")
    reason = parse.text("reason", 1000)
    with db.connection() as conn:
        if force:
            locks.force_release(conn, name, token, reason)
        else:
            locks.release(conn, name, token)
    pollers().locks.poll_soon(lambda waiter: waiter.name == name)
    return answer.nothing()


@bp.get("/<name:_>")
def inspect(_: str) -> Response:
    name = parse.lock_name()
    with db.connection() as conn:
        grant = locks.get(conn, name)
        if grant is None:
            raise errors.NotFound("The lock is free.", lock_name=name)
        return answer.json({**msgspec.structs.asdict(grant), "waiting": locks.waiting(conn, name)})


@bp.get("")
@parse.query(*parse.PAGE, "prefix", "owner")
def held() -> Response:
    prefix, owner, after = parse.text("prefix") or "", parse.text("owner"), parse.cursor(str)
    with db.connection() as conn:
        return answer.page(
            lambda limit: locks.held(conn, prefix=prefix, owner=owner, after=after or "", limit=limit),
            lambda grant: grant.lock_name,
        )


def _name() -> str:
    """The name in the path. Raises Invalid for one of Loom's own locks, also to the holder of its token."""
    name = parse.lock_name()
    if name.startswith(RESERVED_NAME):
        raise errors.Invalid.field("lock_name", f"must not begin with {RESERVED_NAME}, which is reserved for Loom")
    return name


def _owner(owner: str | None) -> str:
    if owner is None:
        before = cast(LockWaiter | None, waited())
        return before.owner if before is not None else idempotency.owner() or str(uuid.uuid4())
    if owner.startswith(RESERVED_OWNER):
        raise errors.Invalid.field("owner", f"must not begin with {RESERVED_OWNER}, which is reserved for instances")
    return owner
