"""/api/v1/agents: AI workers. Heartbeats are in http/claims.py."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from loom.http import entities
from loom.http.beads import Tags
from loom.http.parse import Key, Name, Reference
from loom.state.agents import Agent


class AgentBody(entities.Body):
    id: Key | UnsetType = UNSET
    name: Name | UnsetType = UNSET
    role: str | UnsetType = UNSET
    persona_name: Name | UnsetType = UNSET
    persona: dict[str, Any] | UnsetType | None = UNSET
    provider_id: Reference = UNSET
    status: Literal["paused", "idle", "working", "deciding", "blocked", "dead"] | UnsetType = UNSET
    project_id: Reference = UNSET
    position_id: Reference = UNSET
    capabilities: Tags | UnsetType = UNSET
    attributes: dict[str, Any] | UnsetType = UNSET


def _adapt(patch: dict[str, Any], key: str | None) -> None:
    for field in ("provider_id", "project_id", "position_id"):
        if patch.get(field) == "":
            patch[field] = None
    if patch.get("persona_name") and "/" not in patch["persona_name"]:
        patch["persona_name"] = "default/" + patch["persona_name"]
    if key is None and not patch.get("name") and patch.get("persona_name"):
        patch["name"] = patch["persona_name"].rpartition("/")[2] or patch["persona_name"]


KIND = entities.Kind(
    Agent,
    AgentBody,
    required=("persona_name", "project_id"),
    filters=("project_id", "status", "provider_id"),
    original=frozenset({"POST", "PUT"}),
    adapt=_adapt,
)
bp = entities.blueprint(KIND)
