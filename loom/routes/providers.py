"""/api/v1/providers: LLM endpoints. To register an existing one changes it."""

from __future__ import annotations

from typing import Annotated, Any

from flask import Response
from msgspec import Meta

from loom import db
from loom.http import answer, entities, parse
from loom.http.parse import MAX_NAME
from loom.state.entities import get
from loom.state.providers import Provider

ProviderBody = entities.body_of(
    Provider,
    "`api_key` is not stored: it only sets `requires_key` and `key_id`.",
    name=Annotated[str, Meta(max_length=MAX_NAME)],
    cost_per_mtoken=Annotated[float, Meta(ge=0)],
    api_key=str | None,
)


def _adapt(patch: dict[str, Any], key: str | None) -> None:
    entities.drop_empty_name(patch)
    if key is None and not (patch.get("name") or patch.get("id")):
        raise parse.missing("name")
    if patch.pop("api_key", None):
        patch["requires_key"] = True
        if key or patch.get("id"):  # a new provider has no id yet; a trigger sets its key_id
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
    """The configured names; Loom does not ask the provider."""
    with db.connection() as conn:
        provider = get(conn, Provider, parse.key(key))
    names = dict.fromkeys((provider.selected_model, provider.configured_model, provider.model))
    return answer.json({"models": [{"id": name} for name in names if name]})
