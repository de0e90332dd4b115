"""Providers: LLM endpoints that agents use. Loom calls none of them and stores no key."""

from __future__ import annotations

from typing import Any, Literal

from loom.db import Time
from loom.state.entities import Entity


class Provider(Entity, kw_only=True):
    """An LLM endpoint. `key_id` names the key that somebody else keeps."""

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
