"""What the database refuses, as our errors; this is where such a 409 gets its text.

By one rule: the expected answer of a race (stale, claimed by another, lost) is the `outcome` of a function, with a
`detail`. What breaks a transaction off (a lost fence, a name held from outside, a cycle, a closed project, an unknown
reference, which is L0004) raises an SQLSTATE of ours, with its detail as JSON. Either names an error by its type.
"""

from __future__ import annotations

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
}
ENTITIES = ("projects", "providers", "agents", "beads")  # tables whose ids clients choose
TIMES = {"acquired_at", "expires_at", "heartbeat_at", "ended_at", "closed_at", "not_before", "lease_expires_at"}


def check(row: Mapping[str, Any]) -> None:
    """Raises the error that the `outcome` of a function's row means, unless the outcome is no refusal."""
    if row["outcome"] in _TEXTS:
        raise error(row["outcome"], row["detail"] or {})


def error(outcome: str, detail: Detail) -> errors.Error:
    """The error that an outcome means, with its text. detail: the members of the problem."""
    return errors.BY_TYPE[outcome](_TEXTS[outcome](detail), **_with_times(detail))


def raised(exc: psycopg2.Error) -> errors.Error | None:
    """The error that PostgreSQL raised for what a client sent, or None for any other."""
    diag, code = exc.diag, exc.pgcode or ""
    if code == "L0004":
        return unknown_reference(**json.loads(diag.message_detail or "{}"))
    if code in SQLSTATES:
        return error(SQLSTATES[code], json.loads(diag.message_detail or "{}"))
    if code == "23503":  # a foreign key
        field = (diag.constraint_name or "").removesuffix("_fkey").partition("_")[2]
        value = re.search(r"=\((.*)\)", diag.message_detail or "", re.DOTALL)
        return unknown_reference(field, value[1] if value else "it")
    if code == "23505" and diag.table_name in ENTITIES:  # another has taken the id meanwhile
        return error("taken", {"id": (diag.message_detail or "").partition("=(")[2].rpartition(")")[0]})
    if code == "23514" and diag.column_name:  # a check of ours that names its column; PostgreSQL's own do not
        return errors.Invalid.field(diag.column_name, diag.message_primary or "is refused")
    return None


def unknown_reference(field: str, value: str) -> errors.Invalid:
    return errors.Invalid.field(field, f"{value} does not exist", value=value)


def _lock_lost(detail: Detail) -> str | None:
    if "ended_how" not in detail:  # told by loom_fence(), which does not look further
        return None
    how = detail["ended_how"]
    return f"This grant of the lock has ended: {how}." if how else "No such grant was given."


def _claim_lost(detail: Detail) -> str:
    if "agent_id" in detail:
        return f"Agent {detail['agent_id']} has no claim of bead {detail['bead_id']} now: claim the bead first."
    how = detail["ended_how"]
    if how is None:
        return "No such claim was given."
    return f"This claim has ended: {how}. Stop working on the bead; claim it again if it is open."


def _bead_blocked(detail: Detail) -> str:
    if detail["blocked_reason"]:
        return f"It {detail['blocked_reason']}. PATCH its status to open to have it tried again."
    if detail["blocked_by"]:
        return "It waits for other beads, in blocked_by: claim those, or wait."
    if detail["children"]:
        return "It waits for its children: claim those, or wait."
    if detail["not_before"]:
        return "It failed; claim it again after not_before."
    return "Somebody blocked it. PATCH its status to open to have it tried."


def _bead_claimed(detail: Detail) -> str:
    holder = detail["holder"]
    if holder["agent_id"] is None:
        return "A person works on it, without a claim: PATCH its status to open to take it away."
    if holder["lease_expires_at"] is None:
        return f"It is for agent {holder['agent_id']}: PATCH assigned_to to take it away."
    return f"Agent {holder['agent_id']} works on it: claim another, or POST .../redispatch to take it away."


_TEXTS: dict[str, Callable[[Detail], str | None]] = {
    "agent-busy": lambda detail: "Complete, fail or release one of its beads first.",
    "bead-blocked": _bead_blocked,
    "bead-claimed": _bead_claimed,
    "bead-closed": lambda detail: "PATCH its status to open if there is more to do.",
    "claim-lost": _claim_lost,
    "cycle": lambda detail: f"Beads would wait for each other: {' -> '.join(detail['cycle'])}",
    "in-use": lambda detail: f"Some {detail['used_by']} still refer to it: move or delete them first.",
    "lock-held": lambda detail: (
        "An automatic lock of this change is held from outside: present its token in Loom-Lock-Token, or wait."
    ),
    "lock-lost": _lock_lost,
    "open-children": lambda detail: (
        "Its children are not closed: complete it after them, or fail or release it. The claim goes on."
    ),
    "project-closed": lambda detail: f"Project {detail['project_id']} takes no beads until it is reopened.",
    "taken": lambda detail: f"The id {detail['id']} is taken.",
}


def _with_times(value: Any, name: str = "") -> Any:
    """As the rest of an answer has times: the JSON that PostgreSQL makes bears them as texts."""
    if isinstance(value, Mapping):
        return {key: _with_times(each, key) for key, each in value.items()}
    return msgspec.convert(value, datetime) if name in TIMES and isinstance(value, str) else value
