"""Agents: AI workers, which heartbeat and work on beads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from loom.db import Time
from loom.state.entities import Action, Entity, Id, Steps, enter


class Agent(Entity, kw_only=True):
    """An AI worker. `heartbeat_at` is absent until its first heartbeat: only then can it die of missing them."""

    kind: ClassVar[str] = "agent"
    table: ClassVar[str] = "agents"
    new_id: ClassVar[str] = (
        "'agent-' || floor(extract(epoch FROM clock_timestamp())) || '-' || id_of_name(%(name)s) || %(suffix)s"
    )
    conditions: ClassVar[Mapping[str, str]] = {
        "capability": "capabilities && %(capability)s",
        # without its part before the last slash, too: backend is default/backend
        "persona_type": "ARRAY[persona_name, regexp_replace(persona_name, '^.*/', '')] && %(persona_type)s",
    }

    name: str
    role: str = ""
    persona_name: str
    persona: dict[str, Any] | None = None
    provider_id: Id | None = None
    status: Literal["paused", "idle", "working", "deciding", "blocked", "dead"]
    current_bead: Id | None = None
    project_id: Id | None
    position_id: Id | None = None
    capabilities: list[str] = []
    open_claims: int = 0
    started_at: Time
    last_active: Time
    heartbeat_at: Time | None = None

    @classmethod
    def steps(cls, key: str, action: Action, patch: Mapping[str, Any]) -> Steps:
        """An agent that ends gives its beads back. They are locked before its row, as in a claim."""
        if action != "delete" and patch.get("status") != "dead":
            return Steps(enter(key))
        beads = "ARRAY(SELECT 'bead:' || b FROM beads_of(%(key)s) AS b LIMIT bound('names'))"
        names = beads if action == "delete" else "'{}'"
        locked = """
            SELECT count(*) FROM (
                SELECT 1 FROM beads WHERE assigned_to = %(key)s AND status <> 'closed' AND entered() IS NOT NULL
                   AND (%(deletes)s OR fencing_token IS NOT NULL)
                 ORDER BY id LIMIT CASE WHEN %(deletes)s THEN bound('names') END FOR UPDATE) AS locked
            """
        return Steps(f"{enter(key, names)}; {locked}")
