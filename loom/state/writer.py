"""Who writes, and under which locks."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import psycopg2

from loom import db, errors, locks

ACTING = "SELECT acting_as(%(actor)s, %(instance_id)s, %(request_id)s, %(proxy_request_id)s); "


class Writer(msgspec.Struct, frozen=True):
    """Who makes a request.

    request_id: the client's name for it, which decides nothing. proxy_request_id: the proxy's; see acting_as() in
    schema.sql. fences: the grants that the request presents, lock name -> fencing token; all must be held for it to
    write.
    """

    actor: str | None = None
    instance_id: str | None = None
    request_id: str | None = None
    proxy_request_id: str | None = None
    fences: dict[str, int] = {}


class Answer(msgspec.Struct):
    """What a function tells in one value instead of several columns."""

    outcome: str
    bead: msgspec.Raw = msgspec.Raw(b"null")
    detail: Any = None


def call(conn: db.Connection, writer: Writer, sql: str, **params: Any) -> db.Row:
    """Runs one deciding function of schema.sql for the writer, in one round trip; `%(fences)s` are its grants.

    Raises LockHeld when a name is held from outside, LockLost when a grant that the writer presents has ended.
    """
    fences = writer.fences
    try:
        row = db.row(
            conn,
            ACTING + sql,
            actor=writer.actor,
            instance_id=writer.instance_id,
            request_id=writer.request_id,
            proxy_request_id=writer.proxy_request_id,
            fences=json.dumps(fences) if fences else None,
            **params,
        )
    except psycopg2.DatabaseError as exc:
        if exc.pgcode != "L0001":
            raise
        name = exc.diag.message_detail or ""
        raise errors.LockLost(lock_name=name, fencing_token=fences.get(name)) from exc
    if "answer" in row:
        row = msgspec.structs.asdict(msgspec.json.decode(row["answer"], type=Answer))
    if row.get("outcome") == "lock-held":
        raise errors.LockHeld(
            "An automatic lock of this change is held from outside: present its token in Loom-Lock-Token, or wait.",
            lock_name=row["detail"]["lock_name"],
            holder=msgspec.convert(row["detail"], locks.Grant),
        )
    return row
