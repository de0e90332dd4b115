"""Providers: LLM endpoints that agents use. Loom calls none of them and stores no key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from loom.db import Time
from loom.state.entities import Action, Entity, Steps, enter


class Provider(Entity, kw_only=True):
    """An LLM endpoint. `key_id` names the key that somebody else keeps."""

    kind: ClassVar[str] = "provider"
    table: ClassVar[str] = "providers"
    new_id: ClassVar[str] = "id_of_name(%(name)s) || %(suffix)s"

    name: str
    type: str
    endpoint: str
    model: str
    configured_model: str
    selected_model: str
    selection_reason: str
    model_score: float
    selected_gpu: str
    gpu_constraints: dict[str, Any] | None = None
    description: str
    requires_key: bool
    key_id: str
    owner_id: str
    is_shared: bool
    status: Literal["pending", "active", "error"]
    last_heartbeat_at: Time | None
    last_heartbeat_latency_ms: int
    last_heartbeat_error: str
    cost_per_mtoken: float
    context_window: int
    supports_function: bool
    supports_vision: bool
    supports_streaming: bool
    tags: list[str]
    metrics: dict[str, Any]

    @classmethod
    def steps(cls, key: str, action: Action, patch: Mapping[str, Any]) -> Steps:
        """Agents lose a provider that is deleted."""
        agents = "ARRAY(SELECT 'agent:' || a FROM agents_of('provider', %(key)s) AS a LIMIT bound('names'))"
        return Steps(enter(key, agents) if action == "delete" else enter(key))
