"""/api/v1/providers: LLM endpoints. Registering one again changes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from flask import Response
from msgspec import UNSET, Meta, UnsetType

from loom import db
from loom.http import answer, entities, parse
from loom.http.beads import Tags
from loom.http.parse import Key, Name, Time
from loom.state.entities import get
from loom.state.providers import Provider

Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]


class ProviderBody(entities.Body):
    """`api_key` is not stored: it only sets `requires_key` and `key_id`."""

    id: Key | UnsetType = UNSET
    name: Name | UnsetType = UNSET
    type: str | UnsetType = UNSET
    endpoint: str | UnsetType = UNSET
    model: str | UnsetType = UNSET
    configured_model: str | UnsetType = UNSET
    selected_model: str | UnsetType = UNSET
    selection_reason: str | UnsetType = UNSET
    model_score: float | UnsetType = UNSET
    selected_gpu: str | UnsetType = UNSET
    gpu_constraints: dict[str, Any] | UnsetType | None = UNSET
    description: str | UnsetType = UNSET
    requires_key: bool | UnsetType = UNSET
    key_id: str | UnsetType = UNSET
    api_key: str | UnsetType | None = UNSET
    owner_id: str | UnsetType = UNSET
    is_shared: bool | UnsetType = UNSET
    status: Literal["pending", "active", "error"] | UnsetType = UNSET
    last_heartbeat_at: Time | UnsetType | None = UNSET
    last_heartbeat_latency_ms: Count | UnsetType = UNSET
    last_heartbeat_error: str | UnsetType = UNSET
    cost_per_mtoken: Annotated[float, Meta(ge=0)] | UnsetType = UNSET
    context_window: Count | UnsetType = UNSET
    supports_function: bool | UnsetType = UNSET
    supports_vision: bool | UnsetType = UNSET
    supports_streaming: bool | UnsetType = UNSET
    tags: Tags | UnsetType = UNSET
    metrics: dict[str, Any] | UnsetType = UNSET
    attributes: dict[str, Any] | UnsetType = UNSET


def _adapt(patch: dict[str, Any], key: str | None) -> None:
    if key is None and not (patch.get("name") or patch.get("id")):
        raise parse.missing("name")
    if patch.pop("api_key", None):
        patch["requires_key"] = True
        if key or patch.get("id"):  # else when there is one
            patch["key_id"] = f"{key or patch['id']}-api-key"


KIND = entities.Kind(
    Provider,
    ProviderBody,
    required=(),
    filters=("status", "type", "owner_id"),
    original=frozenset({"POST", "PUT"}),
    create="upsert",
    adapt=_adapt,
)
bp = entities.blueprint(KIND)


@bp.get("/<key>/models")
def models(key: str) -> Response:
    """The configured names: Loom asks no provider."""
    with db.connection() as conn:
        provider = get(conn, Provider, parse.key(key))
    names = dict.fromkeys((provider.selected_model, provider.configured_model, provider.model))
    return answer.json({"models": [name for name in names if name]})
