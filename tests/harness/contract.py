"""Checks answers against the OpenAPI document: it must describe everything that is answered."""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

import jsonschema_rs
from werkzeug.http import parse_options_header

from loom.routes import openapi

if TYPE_CHECKING:
    from harness.client import Answer

HEADERS = ("ETag", "Link", "Retry-After", "Idempotency-Replayed")  # those that clients rely on
SLASHES = ("/api/v1/locks/{name}", "/api/v1/file-locks/{project_id}/{path}")  # the last parameter may contain slashes


@functools.cache
def document() -> dict[str, Any]:
    return openapi.document()


def operation(method: str, path: str) -> tuple[str, dict[str, Any]] | None:
    """The path's template and the operation, or None when there is none."""
    for pattern, template in _patterns():
        if pattern.fullmatch(path):
            found = document()["paths"][template].get(method.lower())
            return (template, found) if found is not None else None
    return None


def check(method: str, path: str, answer: Answer) -> None:
    """Assert that the document describes this answer. Does nothing where the document has no such operation."""
    found = operation(method, path.partition("?")[0])
    if found is None:
        return
    template, described = found
    where = f"{method} {template}: {answer.status} {answer.body[:1000]!r}"
    told = described["responses"].get(str(answer.status))
    assert told is not None, f"{where}: no such status in the contract"
    told = resolved(told)
    for name in HEADERS:
        assert name not in answer.headers or name in told.get("headers", {}), f"{where}: {name} is not in the contract"
    if "ETag" in told.get("headers", {}):
        assert "ETag" in answer.headers, f"{where}: no ETag"
    kind = parse_options_header(answer.headers.get("Content-Type"))[0]
    if "content" not in told:
        assert not answer.body, f"{where}: a body that is not in the contract"
        return
    assert kind in told["content"], f"{where}: {kind} is not in the contract"
    if kind.endswith("json"):
        assert answer.body.endswith(b"\n"), f"{where}: no newline at the end"
        schema = json.dumps(told["content"][kind]["schema"])
        faults = [f"{fault.instance_path}: {fault.message}" for fault in _validator(schema).iter_errors(answer.json)]
        assert not faults, f"{where}: {faults}"


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    """The component that a reference names, or the node itself."""
    while "$ref" in node:
        *_, kind, name = node["$ref"].split("/")
        node = document()["components"][kind][name]
    return node


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """Paths with fewer parameters come first: /beads/claim is not the bead `claim`."""
    found = []
    for template in sorted(document()["paths"], key=lambda path: path.count("{")):
        text = re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(template))
        found.append((re.compile(text + "(/.*)?" if template in SLASHES else text), template))
    return found


@functools.cache
def _validator(schema: str) -> Any:
    """Return a validator for a schema of the document that refuses keys the schema does not have."""
    told = json.loads(schema)
    closed = {**told, "unevaluatedProperties": False} if told.get("type") != "array" else told
    if told.get("type") == "array":
        closed = {**told, "items": {**told["items"], "unevaluatedProperties": False}}
    return jsonschema_rs.Draft202012Validator({**closed, "components": document()["components"]}, validate_formats=True)
