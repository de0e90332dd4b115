"""/api: the interface for programs, in a form to read."""

from __future__ import annotations

import functools
from typing import Any

from flask import Blueprint, Response

from loom.page.render import html
from loom.routes import openapi

bp = Blueprint("page_api", __name__)

METHODS = ("get", "post", "put", "patch", "delete")


@bp.get("/api")
def contract() -> Response:
    """Needs no database."""
    return html("api.html", groups=_groups())


@functools.cache
def _groups() -> dict[str, list[dict[str, Any]]]:
    """The operations of the contract by the word of their URL, with references resolved."""
    document = openapi.document()

    def resolved(node: Any) -> Any:
        while isinstance(node, dict) and "$ref" in node:
            target = document
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            node = target
        return node

    found: dict[str, list[dict[str, Any]]] = {}
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                operation = item[method]
                found.setdefault(operation["tags"][0], []).append(
                    {
                        "method": method.upper(),
                        "path": path,
                        "id": operation["operationId"],
                        "summary": operation["summary"],
                        "description": operation.get("description"),
                        "parameters": [_field(resolved(p), resolved) for p in operation["parameters"]],
                        "body": _fields(operation.get("requestBody", {}), resolved),
                        "answers": [
                            {"status": status, "text": resolved(answer)["description"]}
                            for status, answer in operation["responses"].items()
                        ],
                    }
                )
    return found


def _fields(holder: dict[str, Any], resolved: Any) -> list[dict[str, Any]]:
    """The members of a body."""
    media: dict[str, Any] = next(iter(holder.get("content", {}).values()), {})
    schema = resolved(media.get("schema", {}))
    required = schema.get("required", ())
    return [
        {"name": name, "in": "body", "required": name in required, "type": _type(part, resolved), "text": _text(part)}
        for name, part in schema.get("properties", {}).items()
    ]


def _field(parameter: dict[str, Any], resolved: Any) -> dict[str, Any]:
    return {
        "name": parameter["name"],
        "in": parameter["in"],
        "required": parameter.get("required", False),
        "type": _type(parameter.get("schema", {}), resolved),
        "text": parameter.get("description") or "",
    }


def _type(schema: dict[str, Any], resolved: Any) -> str:
    """A schema in a few words."""
    schema = resolved(schema)
    if "enum" in schema:
        return ", ".join("null" if value is None else str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type(part, resolved) for part in schema["anyOf"])
    kinds = schema.get("type", "any")
    text = " or ".join(kinds) if isinstance(kinds, list) else kinds
    if text == "array":
        text = f"list of {_type(schema.get('items', {}), resolved)}"
    bounds = [f"{word} {schema[key]}" for key, word in BOUNDS.items() if key in schema]
    return text + (f" ({', '.join(bounds)})" if bounds else "")


BOUNDS = {
    "minimum": "at least",
    "maximum": "at most",
    "minLength": "characters at least",
    "maxLength": "characters at most",
    "maxItems": "items at most",
    "default": "default",
}


def _text(schema: dict[str, Any]) -> str:
    return schema.get("description") or ""
