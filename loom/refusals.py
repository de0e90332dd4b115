"""Maps what the database refuses to our errors; here such a 409 gets its text.

One rule: an expected result of a race (stale, claimed by another, lost) is the `outcome` of an SQL function, with a
`detail`. What must abort a transaction (a lost fence, a lock held from outside, a cycle, a closed project; L0004 is an
unknown reference) raises one of our own SQLSTATEs, with its detail as JSON. Both lead to an error by its type.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec
import psycopg2

from loom import errors

Detail = Mapping[str, Any]

SQLSTATES = {
    "L0001": "lock-lost",
    "L0002": "cycle",
    "L0003": "lock-held",
    "L0005": "project-closed",
    "L0006": "too-large",
    "L0007": "too-many-beads",
    "L0008": "too-many-beads",
    "L0009": "too-many-beads",
    "L0010": "in-use",
}
ENTITIES = ("projects", "providers", "agents", "beads")  # tables whose ids clients choose
UNKNOWN_GRANT = "No such grant is known: it was never made, or its history was removed."
TIMES = {"acquired_at", "expires_at", "heartbeat_at", "ended_at", "closed_at", "not_before", "lease_expires_at"}


def check(row: Mapping[str, Any]) -> None:
    """Raises the error for the `outcome` in a function's row, if that outcome is a refusal."""
    if row["outcome"] in _TEXTS:
        raise error(row["outcome"], row["detail"] or {})


def error(outcome: str, detail: Detail) -> errors.Error:
    """The error for an outcome, with its text. detail: the members of the problem document."""
    return errors.BY_TYPE[outcome](_TEXTS[outcome](detail), **_with_times(detail))


def from_postgres(exc: psycopg2.Error) -> errors.Error | None:
    """Our error for one that PostgreSQL raised because of a client's input; None for all others."""
    diag, code = exc.diag, exc.pgcode or ""
    if code == "L0004":
        return unknown_reference(**json.loads(diag.message_detail or "{}"))
    if code == "L0011":
        return errors.Forbidden(diag.message_primary)
    if code in SQLSTATES:
        return error(SQLSTATES[code], json.loads(diag.message_detail or "{}"))
    if code == "23503":  # a foreign key
        field = (diag.constraint_name or "").removesuffix("_fkey").partition("_")[2]
        value = re.search(r"=\((.*)\)", diag.message_detail or "", re.DOTALL)
        return unknown_reference(field, value[1] if value else "it")
    if code == "23505" and diag.table_name in ENTITIES:  # another request has taken the id in the meantime
        return error("taken", {"id": (diag.message_detail or "").partition("=(")[2].rpartition(")")[0]})
    if (
        code == "23514" and diag.column_name
    ):  # raised by our own functions, which name the column; PostgreSQL's checks do not
        return errors.Invalid.field(diag.column_name, diag.message_primary or "is refused")
    return None


def unknown_reference(field: str, value: str) -> errors.Invalid:
    problem = "does not exist"
    if field == "assigned_to":
        problem = "is neither an agent's id nor the role of exactly one agent"
    return errors.Invalid.field(field, f"{value} {problem}", value=value)


def _lock_lost(detail: Detail) -> str | None:
    if "ended_how" not in detail:  # raised by loom_fence(), which does not look up how the grant ended
        return None
    how = detail["ended_how"]
    return f"This grant of the lock has ended: {how}." if how else UNKNOWN_GRANT


def _claim_lost(detail: Detail) -> str:
    if "agent_id" in detail:
        return f"Agent {detail['agent_id']} has no claim on bead {detail['bead_id']} now: claim the bead first."
    how = detail["ended_how"]
    if how is None:
        return "No such claim is known: it was never made, or its history was removed."
    return f"This claim has ended: {how}. Stop working on the bead; claim it again if it is open."


def _bead_blocked(detail: Detail) -> str:
    if detail["blocked_reason"]:
        return f"It {detail['blocked_reason']}. PATCH its status to open so that it can be claimed again."
    if detail["blocked_by"]:
        return "It waits for other beads, in blocked_by: claim those, or wait."
    if detail["children"]:
        return "It waits for its children: claim those, or wait."
    if detail["not_before"]:
        return "It is delayed: claim it again after not_before."
    return "Its status was set to blocked or deferred. PATCH it to open so that it can be claimed."


def _bead_claimed(detail: Detail) -> str:
    holder = detail["holder"]
    if holder["agent_id"] is None:
        return "A person works on it, without a claim: PATCH its status to open to take it away."
    if holder["lease_expires_at"] is None:
        return f"It is reserved for agent {holder['agent_id']}: PATCH assigned_to to take it away."
    return f"Agent {holder['agent_id']} works on it: claim another, or POST .../redispatch to take it away."


def _too_many_beads(detail: Detail) -> str:
    most = detail["most"]
    if "beads" in detail:
        return (
            f"This request would change {detail['beads']} other beads, and one may change {most}: write blocked_by and"
            " parent of those beads, or send a shorter list first, and then the whole."
        )
    if "bead_id" in detail:
        return f"At most {most} beads may wait for one bead, or be its children; {detail['bead_id']} has as many."
    return f"To look for a cycle, more than {most} beads would be visited: write fewer dependencies at a time."


_TEXTS: dict[str, Callable[[Detail], str | None]] = {
    "agent-busy": lambda detail: "Complete, fail or release one of its beads first.",
    "bead-blocked": _bead_blocked,
    "bead-claimed": _bead_claimed,
    "bead-closed": lambda detail: "PATCH its status to open if there is more to do.",
    "claim-lost": _claim_lost,
    "cycle": lambda detail: f"Beads would wait for each other: {' -> '.join(detail['cycle'])}",
    "in-use": lambda detail: (
        f"Bead {detail['bead_id']} of it is in progress: complete, release or close it first."
        if "bead_id" in detail
        else f"Some {detail['used_by']} still refer to it: move or delete them first."
    ),
    "lock-held": lambda detail: (
        "An automatic lock of this change is held from outside: present its token in Loom-Lock-Token, or wait."
    ),
    "lock-lost": _lock_lost,
    "open-children": lambda detail: (
        "Its children are not closed: complete it after them, or fail or release it. The claim is still valid."
    ),
    "project-closed": lambda detail: f"Project {detail['project_id']} accepts no beads until it is reopened.",
    "too-large": lambda detail: (
        f"The {detail['kind']} {detail['id']} would have {detail['size']} bytes; it may have up to {detail['most']}."
    ),
    "too-many-beads": _too_many_beads,
    "taken": lambda detail: f"The id {detail['id']} is already in use.",
}


def _with_times(detail: Detail) -> dict[str, Any]:
    """The members with times as other answers have them: PostgreSQL's JSON has them as texts.

    Those of the holder, too, but nothing within its metadata, which are its owner's.
    """
    members: dict[str, Any] = {}
    for name, value in detail.items():
        members[name] = _with_times(value) if name == "holder" and isinstance(value, Mapping) else value
        if name in TIMES and isinstance(value, str):
            with contextlib.suppress(msgspec.ValidationError):  # infinity, by hand
                members[name] = msgspec.convert(value, datetime)
    return members
