"""/api/v1/file-locks: which agent works on which file of a project."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import msgspec
from flask import Blueprint, Response
from msgspec import Meta

from loom import db, locks
from loom.http import answer, headers, idempotency, parse
from loom.http.parse import Key
from loom.http.settings import settings
from loom.state import file_locks
from loom.state.file_locks import File, FileLock

bp = Blueprint("file_locks", __name__, url_prefix="/api/v1/file-locks")


class LockFile(msgspec.Struct):
    """`bead_id`: a bead that the agent has claimed; the lock ends with that claim."""

    file_path: str
    project_id: Key
    agent_id: Key
    bead_id: Annotated[str, Meta(max_length=200)] | None = None


def _timeout() -> timedelta:
    return timedelta(seconds=settings().agents.file_lock_timeout)


def _extended(conn: db.Connection, first: dict[str, Any]) -> FileLock:
    """The lock of this request's first answer, extended. Raises LockLost when it has ended."""
    return file_locks.of_grant(locks.renew(conn, first["lock_name"], first["fencing_token"], _timeout(), extend=True))


@bp.post("")
def take() -> Response:
    body = parse.body(LockFile)
    file = File(body.project_id, parse.file_path(body.file_path))
    writer = headers.writer(file.lock_name, body.agent_id)

    def work(conn: db.Connection) -> Response:
        lock, new = file_locks.take(conn, writer, file, body.agent_id, body.bead_id or None, _timeout())
        return answer.json(lock, 201 if new else 200)

    return idempotency.once(work, refresh=_extended)


@bp.delete("/<name:_>")
@parse.query("agent_id")
def release(_: str) -> Response:
    project, _slash, path = parse.raw_path("/api/v1/file-locks/", "file_path").partition("/")
    file, agent = File(parse.key(project), parse.file_path(path)), parse.text("agent_id")
    if not agent:
        raise parse.missing("agent_id")
    with db.connection() as conn:
        file_locks.release(conn, headers.writer(file.lock_name, agent), file, agent)
    return answer.nothing()


@bp.get("")
@parse.query(*parse.PAGE, "project_id")
def some() -> Response:
    project, after = parse.text("project_id") or None, parse.cursor(str) or ""
    with db.connection() as conn:
        return answer.page(
            lambda limit: file_locks.some(conn, project=project, after=after, limit=limit),
            lambda lock: lock.lock_name,
        )
