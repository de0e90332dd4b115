"""/api/v1/agents: AI workers. Heartbeats are in routes/claims.py."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from loom import errors
from loom.http import entities
from loom.http.parse import MAX_NAME, Name
from loom.state.agents import Agent

AgentBody = entities.body_of(
    Agent,
    without=("current_bead", "open_claims", "started_at", "last_active", "heartbeat_at"),
    name=Annotated[str, Meta(max_length=MAX_NAME)],
    persona_name=Name,
)


def _adapt(patch: dict[str, Any], key: str | None) -> None:
    for field in ("provider_id", "project_id", "position_id"):
        if patch.get(field) == "":
            patch[field] = None
    if patch.get("persona_name") and "/" not in patch["persona_name"]:
        patch["persona_name"] = "default/" + patch["persona_name"]
        if len(patch["persona_name"]) > MAX_NAME:
            raise errors.Invalid.field("persona_name", f"must have at most {MAX_NAME} characters, default/ included")
    entities.drop_empty_name(patch)
    if key is None and not patch.get("name") and patch.get("persona_name"):
        patch["name"] = patch["persona_name"].rpartition("/")[2] or patch["persona_name"]


KIND = entities.Kind(
    Agent,
    AgentBody,
    required=("persona_name", "project_id"),
    filters=("project_id", "status", "provider_id", "persona_type", "capability"),
    original=frozenset({"POST", "PUT"}),
    adapt=_adapt,
)
bp = entities.blueprint(KIND)
