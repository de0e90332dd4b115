"""Claims: which agent works on which bead, until when. loom/sql/claims.sql decides, in one round trip."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

import msgspec
import psycopg2

from loom import db, errors, metrics, refusals
from loom.db import Time
from loom.state.agents import Agent
from loom.state.beads import Bead
from loom.state.entities import UNCONDITIONAL, Conditions, change, not_found
from loom.state.writer import Writer, call

Ending = Literal["released", "completed", "failed"]


class Claim(msgspec.Struct):
    """A bead that an agent has now; `status` is 'claimed'."""

    status: str
    bead: Bead
    fencing_token: int
    lease_expires_at: Time


class Holder(msgspec.Struct):
    """Who has a bead. `alive` is None when nobody has it, `lease_expires_at` when it is not claimed."""

    agent_id: str | None
    alive: bool | None
    lease_expires_at: Time | None


class HeartbeatResult(msgspec.Struct):
    """extended: bead -> the new end of its claim; lost: bead -> how its claim ended, or None if that is not known."""

    extended: dict[str, Time]
    lost: dict[str, str | None]


def claim_next(
    conn: db.Connection,
    writer: Writer,
    agent: str,
    lease: timedelta,
    *,
    project: str | None = None,
    types: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> Claim | None:
    """Claims the best ready bead (of the project, of one of the types, with all the tags), or None.

    Raises Invalid for an unknown agent or project, AgentBusy, LockHeld, LockLost.
    """
    row = _decide(
        conn,
        writer,
        """
        SELECT claim_next(%(agent)s, %(lease)s, %(fences)s, %(project)s, %(types)s, %(tags)s)::text AS answer
        """,
        agent=agent,
        lease=int(lease.total_seconds()),
        project=project,
        types=list(types) or None,
        tags=list(tags) or None,
    )
    if row["outcome"] == "nothing":
        return None
    if row["outcome"] == "unknown-project":
        raise errors.Invalid.field("project_id", f"{project} does not exist")
    return _claim(row)


def claim(conn: db.Connection, writer: Writer, bead: str, agent: str, lease: timedelta) -> Claim:
    """Claims one bead. An agent that has claimed it already gets the same claim, which ends no earlier than before.

    Raises NotFound, Invalid for an unknown agent, BeadClaimed, BeadBlocked, BeadClosed, AgentBusy, LockHeld, LockLost.
    """
    row = _decide(
        conn,
        writer,
        """
        SELECT outcome, bead::text AS bead, detail FROM claim_bead(%(bead)s, %(agent)s, %(lease)s, %(fences)s)
        """,
        bead=bead,
        agent=agent,
        lease=int(lease.total_seconds()),
    )
    return _claim(row, bead)


def renew(
    conn: db.Connection,
    writer: Writer,
    bead: str,
    token: int,
    lease: timedelta | None,
    *,
    extend: bool = False,
) -> Claim:
    """Gives a claim a new end, by its own lease when none is given; with `extend`, never an earlier one.

    Raises ClaimLost, NotFound, LockLost.
    """
    row = _decide(
        conn,
        writer,
        """
        SELECT outcome, bead::text AS bead, detail
          FROM renew_claim(%(bead)s, %(token)s, %(lease)s, %(extend)s, %(fences)s)
        """,
        bead=bead,
        token=token,
        lease=None if lease is None else int(lease.total_seconds()),
        extend=extend,
    )
    return _claim(row, bead)


def end(
    conn: db.Connection,
    writer: Writer,
    bead: str,
    token: int,
    how: Ending,
    why: str | None = None,
    *,
    context: Mapping[str, Any] | None = None,
    retry_after: timedelta | None = None,
) -> Bead:
    """Ends a claim; once more in the same way does no harm.

    'released' gives the bead back as if it had never been claimed. 'completed' closes it, and merges `context` into its
    own; with open children it raises OpenChildren, and the claim goes on. 'failed' gives it back for a later try: after
    `retry_after`, or by the number of its failures.
    Raises ClaimLost when the claim ended in any other way, NotFound, LockHeld, LockLost.
    """
    row = _decide(
        conn,
        writer,
        """
        SELECT outcome, bead::text AS bead, detail FROM end_claim(
            %(bead)s, %(token)s, %(how)s, %(why)s, %(context)s, %(delay)s, %(fences)s)
        """,
        bead=bead,
        token=token,
        how=how,
        why=why,
        context=None if context is None else json.dumps(context),
        delay=None if retry_after is None else int(retry_after.total_seconds()),
    )
    if row["bead"] is None:
        raise not_found(Bead, bead)
    return msgspec.json.decode(row["bead"], type=Bead)


def redispatch(
    conn: db.Connection, writer: Writer, bead: str, reason: str, conditions: Conditions = UNCONDITIONAL
) -> Bead:
    """Opens the bead again, whatever its status; its holder loses it. Raises as `change`."""
    asked = {
        "redispatch_requested": "true",
        "redispatch_requested_at": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "redispatch_reason": reason,
    }
    patch = {"status": "open", "assigned_to": None, "not_before": None, "context": asked}
    return change(conn, writer, Bead, bead, "patch", patch, conditions=conditions)


def heartbeat(
    conn: db.Connection, writer: Writer, agent: str, claims: Mapping[str, int], status: str | None = None
) -> HeartbeatResult:
    """Notes that the agent lives, and extends these claims: bead -> fencing token. Raises NotFound, LockLost."""
    row = call(
        conn,
        writer,
        "SELECT outcome, jsonb_build_object('extended', extended, 'lost', lost)::text AS result"
        "  FROM heartbeat_agent(%(agent)s, %(status)s, %(claims)s, %(fences)s)",
        agent=agent,
        status=status,
        claims=json.dumps(claims),
    )
    if row["outcome"] == "unknown-agent":
        raise not_found(Agent, agent)
    return msgspec.json.decode(row["result"], type=HeartbeatResult)


def lapse(conn: db.Connection, writer: Writer, most: int) -> list[dict[str, Any]]:
    """Reopens beads whose leases have ended, at most `most`.

    Returns each one that was examined: `bead_id`, `agent_id` and, if it could not be reopened, the `problem`.
    """
    sql = "SELECT COALESCE(jsonb_agg(c), '[]') AS lapsed FROM lapse_claims(%(most)s) AS c"
    return call(conn, writer, sql, most=most)["lapsed"]


def end_delays(conn: db.Connection, most: int) -> int:
    """Clears `not_before` of open beads whose delay has ended, and returns how many."""
    return db.value(conn, "SELECT end_delays(%(most)s)", most=most)


def open_deferred(conn: db.Connection, writer: Writer, most: int) -> int:
    """Opens deferred beads whose `not_before` has passed, and returns how many."""
    return call(conn, writer, "SELECT open_deferred(%(most)s) AS opened", most=most)["opened"]


def end_dead_agent(conn: db.Connection, writer: Writer, agent: str) -> str | None:
    """Reopens the beads of a silent agent and marks it as dead: 'dead', or why it is not; None if it is alive."""
    return call(conn, writer, "SELECT end_dead_agent(%(agent)s) AS result", agent=agent)["result"]


def _decide(conn: db.Connection, writer: Writer, sql: str, **params: Any) -> db.Row:
    """Like `call`, and counts the outcome."""
    try:
        row = call(conn, writer, sql, **params)
    except Exception as exc:
        refused = refusals.from_postgres(exc) if isinstance(exc, psycopg2.Error) else exc
        metrics.count_claim(getattr(refused, "type", metrics.OTHER))
        raise
    metrics.count_claim(params["how"] if row["outcome"] == "ended" else row["outcome"])
    return row


def _claim(row: db.Row, key: str = "") -> Claim:
    """The claim in the row of a function. Raises NotFound if there is no bead `key`."""
    if row["outcome"] == "not-found":
        raise not_found(Bead, key)
    bead = msgspec.json.decode(row["bead"], type=Bead)
    assert bead.fencing_token is not None
    assert bead.lease_expires_at is not None
    return Claim("claimed", bead, bead.fencing_token, bead.lease_expires_at)
