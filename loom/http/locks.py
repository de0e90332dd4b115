"""/api/v1/locks: acquire, renew, release, force-release, inspect."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any

import msgspec
from flask import Blueprint, Response
from msgspec import Meta

from loom import db, errors, instances, locks
from loom.http import answer, idempotency, parse, waiting
from loom.locks.queue import Queue, Waiter

bp = Blueprint("locks", __name__, url_prefix="/api/v1/locks")

METADATA_BYTES = 8192
RESERVED_OWNER = "instance:"  # what an instance takes for itself; ends with it

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


@functools.cache
def _queue() -> Queue:
    return Queue(waiting.room(), instances.own_id)


def _again(first: dict[str, Any], made: dict[str, Any] | None = None) -> locks.Grant:
    """The grant that this request's first answer told of, extended. Raises LockLost when it has ended."""
    if made is not None and made["fencing_token"] != first["fencing_token"]:
        with db.connection() as conn:
            locks.take_back(conn, msgspec.convert(made, locks.Grant))
    ttl = timedelta(seconds=parse.body(AcquireLock).ttl_seconds)
    with db.connection() as conn:
        return locks.renew(conn, first["lock_name"], first["fencing_token"], ttl, extend=True)


@bp.post("/<name:_>")
@idempotency.checked(_again, by_itself=True)
def acquire(_: str) -> Response:
    name, body = parse.lock_name(), parse.body(AcquireLock)
    owner, ttl = _owner(body.owner), timedelta(seconds=body.ttl_seconds)
    if body.metadata is not None and len(msgspec.json.encode(body.metadata)) > METADATA_BYTES:
        raise errors.Invalid.field("metadata", f"must have at most {METADATA_BYTES} bytes")

    def ask() -> locks.Attempt:
        with db.connection() as conn:
            return locks.acquire(
                conn,
                name,
                owner,
                ttl,
                instance_id=instances.own_id(),
                metadata=body.metadata,
                wait=body.wait_seconds > 0,
            )

    attempt = ask()
    if not attempt.granted and body.wait_seconds:
        waiter = Waiter(name, owner, ttl, body.metadata, waiting.gone())
        attempt = _wait(waiter, body.wait_seconds, attempt, ask)
    if not attempt.granted:
        raise errors.LockHeld(
            "The lock is promised to a waiter." if attempt.grant is None else None,
            lock_name=name,
            owner=owner,
            holder=attempt.grant,
            waiting=attempt.waiting,
        )
    return answer.json(attempt.grant, 201 if attempt.outcome == "new" else 200)


def _wait(waiter: Waiter, seconds: int, first: locks.Attempt, ask: Callable[[], locks.Attempt]) -> locks.Attempt:
    """The waiter's grant; else the state of things when it gave up, its place kept for 2 s more."""
    queue = _queue()
    if queue.full:
        return first
    granted = queue.wait(waiter, seconds)
    db.default().start_request()
    if not waiter.gone():
        return granted or ask()
    if granted is not None and granted.grant is not None and not waiter.shared:
        with db.connection() as conn:
            locks.take_back(conn, granted.grant)
    return first


@bp.put("/<name:_>")
def renew(_: str) -> Response:
    name, body = parse.lock_name(), parse.body(RenewLock)
    with db.connection() as conn:
        return answer.json(locks.renew(conn, name, body.fencing_token, timedelta(seconds=body.ttl_seconds)))


@bp.delete("/<name:_>")
def release(_: str) -> Response:
    name, token, force = parse.lock_name(), parse.integer("fencing_token", most=parse.MAX_TOKEN), parse.flag("force")
    reason = parse.text("reason", 1000)
    with db.connection() as conn:
        if force:
            locks.force_release(conn, name, token, reason)
        else:
            locks.release(conn, name, token)
    _queue().nudge(lambda waiter: waiter.name == name)
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
def held() -> Response:
    prefix, owner, after = parse.text("prefix") or "", parse.text("owner"), parse.cursor(str)
    with db.connection() as conn:
        return answer.page(
            lambda limit: locks.held(conn, prefix=prefix, owner=owner, after=after or "", limit=limit),
            lambda grant: grant.lock_name,
        )


def _owner(owner: str | None) -> str:
    if owner is None:
        return idempotency.owner() or str(uuid.uuid4())
    if owner.startswith(RESERVED_OWNER):
        raise errors.Invalid.field("owner", f"must not begin with {RESERVED_OWNER}, which instances use for themselves")
    return owner
