"""Who writes, and under which locks."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from loom import db, refusals
from loom.config import Config

ACTING = (
    "SELECT acting_as(%(actor)s, %(instance_id)s, %(request_id)s, %(proxy_request_id)s, %(settings)s, %(principal)s,"
    " %(restricted)s); "
)
AS_AGENT = "SELECT refuse_other_agent(%(actor)s); "


class Writer(msgspec.Struct, frozen=True):
    """Who makes a request.

    config: the one in force in the instance that acts. request_id: the client's name for it, which decides nothing.
    proxy_request_id: the proxy's; see acting_as() in loom/sql/events.sql. fences: the grants that the request presents,
    lock name -> fencing token; all must be held for it to write. principal: whose key the request bears. restricted: it
    may act only for itself, and for agents that it has registered; `actor`, if given, is checked to be one of them.
    """

    config: Config
    actor: str | None = None
    instance_id: str | None = None
    request_id: str | None = None
    proxy_request_id: str | None = None
    fences: dict[str, int] = {}
    principal: str | None = None
    restricted: bool = False


class Answer(msgspec.Struct):
    """What a function tells in one value instead of several columns."""

    outcome: str
    bead: msgspec.Raw = msgspec.Raw(b"null")
    detail: Any = None


def call(conn: db.Connection, writer: Writer, sql: str, **params: Any) -> db.Row:
    """Runs one deciding function of loom/sql/ for the writer, in one round trip; `%(fences)s` are its grants.

    Raises what the function refuses by its outcome, see refusals.py.
    """
    row = db.row(
        conn,
        ACTING + (AS_AGENT if writer.restricted and writer.actor is not None else "") + sql,
        actor=writer.actor,
        instance_id=writer.instance_id,
        request_id=writer.request_id,
        proxy_request_id=writer.proxy_request_id,
        principal=writer.principal,
        restricted=writer.restricted,
        settings=json.dumps(_settings(writer.config)),
        fences=json.dumps(writer.fences) if writer.fences else None,
        **params,
    )
    if "answer" in row:
        row = msgspec.structs.asdict(msgspec.json.decode(row["answer"], type=Answer))
    if row.get("detail") is not None:
        refusals.check(row)
    return row


def _settings(config: Config) -> dict[str, int]:
    """Those that setting() of loom/sql/config.sql knows."""
    return {
        "agents.max_concurrent": config.agents.max_concurrent,
        "agents.dead_after": config.agents.dead_after,
        "beads.max_failures": config.beads.max_failures,
        "beads.max_attempts": config.beads.max_attempts,
    }
