"""Agents: AI workers, which heartbeat and work on beads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from loom.db import Time
from loom.state.entities import Entity, Id


class Agent(Entity, kw_only=True):
    """An AI worker. `heartbeat_at` is absent until its first heartbeat: only then can it die of missing them."""

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
