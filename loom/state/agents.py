"""Agents: AI workers, which heartbeat and work on beads."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from loom.state.entities import Entity


class Agent(Entity, kw_only=True):
    """An AI worker. `heartbeat_at` is absent until its first heartbeat: only then can it die of missing them."""

    name: str
    role: str = ""
    persona_name: str
    persona: dict[str, Any] | None = None
    provider_id: str | None = None
    status: str
    current_bead: str | None = None
    project_id: str | None
    position_id: str | None = None
    capabilities: list[str] = []
    open_claims: int = 0
    started_at: datetime
    last_active: datetime
    heartbeat_at: datetime | None = None
