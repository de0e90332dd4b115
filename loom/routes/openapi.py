"""/api/openapi.yaml: the contract, made from openapi.yaml and from what the code already defines."""

from __future__ import annotations

import functools
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from flask import Blueprint, Response, request

from loom import __version__, errors
from loom.http import parse
from loom.http.entities import Kind
from loom.routes import agents, beads, projects, providers

bp = Blueprint("openapi", __name__)

KINDS = (projects.KIND, providers.KIND, agents.KIND, beads.KIND)


@bp.get("/api/openapi.yaml")
def contract() -> Response:
    response = Response(_text(), content_type="application/yaml")
    response.add_etag()
    response.make_conditional(request)
    return response


@functools.cache
def _text() -> str:
    return yaml.dump(document(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Writes repeated values in full, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    given = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    also, template, structs, problems = (given.pop(part) for part in ("also", "kinds", "structs", "problems"))
    parts = given["components"]
    paths: dict[str, Any] = {}
    for kind in KINDS:
        paths |= _of_kind(kind, template, parts["parameters"]["filter"])
    del parts["parameters"]["filter"]
    parts["responses"] = {}
    for path, item in _merged(paths, given["paths"]).items():
        api = path.startswith("/api/v1/")
        tag, group = (path.split("/")[3], ["api"]) if api else ("service", [])
        for method in [key for key in item if key != "parameters"]:
            operation = _merged({"tags": [tag], "also": group}, item[method])
            item[method] = _operation(method, operation, also, parts["responses"])
        paths[path] = item
    kinds = [pkgutil.resolve_name(place) for place in structs.values()]
    references, found = msgspec.json.schema_components(kinds, ref_template="{name}")
    names = {reference["$ref"]: name for reference, name in zip(references, structs, strict=True)}
    parts["schemas"] |= {
        names.get(name, name): {**schema, "title": names.get(name, name)} for name, schema in found.items()
    }
    parts["schemas"] |= {name: _problem(getattr(errors, name), more) for name, more in problems.items()}
    given["info"]["version"] = __version__
    return _long({**given, "paths": paths}, names)


def _of_kind(kind: Kind, template: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    """The paths of one kind of shared state, made from the template."""
    text = json.dumps(template)
    for word, name in (("kind", kind.name), ("Kind", kind.entity.__name__), ("Body", kind.body.__name__)):
        text = text.replace(f"<{word}>", name)
    paths = json.loads(text)
    every, one, _ = paths.values()
    for column in kind.filters:
        few = parse.allowed(kind.entity).get(column)
        value = {"schema": {"items": {"enum": few}}} if few else {}
        every["get"].setdefault("parameters", []).append(_merged({"name": column, **by}, value))
    every["post"]["requestBody"]["json"] |= {"required": list(kind.required)} if kind.required else {}
    known = sorted({*kind.body.__struct_fields__, *kind.entity.__struct_fields__})
    for method in {"put", "patch"} - {each.lower() for each in kind.original}:
        one[method]["requestBody"]["json"]["propertyNames"] = {"enum": known}
    return paths


def _operation(
    method: str, operation: dict[str, Any], also: Mapping[str, Any], refusals: dict[str, Any]
) -> dict[str, Any]:
    """The operation with the parts that `also` adds, and with one response for each status of its problems."""
    for group in ("every", method, *(["body"] if "requestBody" in operation else []), *operation.pop("also", [])):
        operation = _merged(operation, also.get(group, {}))
    answers = operation["responses"]
    for answer in answers.values() if method == "post" else ():
        answer["headers"] = [*answer.get("headers", []), "Idempotency-Replayed"]
    kinds = [getattr(errors, name) for name in sorted(set(operation.pop("problems")))]
    for status in sorted({kind.status for kind in kinds}):
        these = [kind for kind in kinds if kind.status == status]
        name = "Or".join(kind.__name__ for kind in these)
        schemas = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in these]
        mapping = {f"/problems/{kind.type}": schema["$ref"] for kind, schema in zip(these, schemas, strict=True)}
        several = {"oneOf": schemas, "discriminator": {"propertyName": "type", "mapping": mapping}}
        refusals[name] = {
            "description": " Or: ".join(kind().title for kind in these),
            "headers": ["Retry-After"] if any(kind.retry_after for kind in these) else [],
            "content": {"application/problem+json": {"schema": several if len(these) > 1 else schemas[0]}},
        }
        answers[str(status)] = {"$ref": f"#/components/responses/{name}"}
    return operation


def _problem(kind: type[errors.Error], more: dict[str, Any]) -> dict[str, Any]:
    known = {"type": {"const": f"/problems/{kind.type}"}, "status": {"const": kind.status}}
    schema = {"description": kind().title, "allOf": [{"$ref": "Problem"}], "properties": known, "required": [*known]}
    return _merged(schema, more)


def _merged(one: Any, other: Any) -> Any:
    """Objects merged key by key, lists appended; of other values, `other`."""
    if isinstance(one, dict):
        return one | {key: _merged(one[key], value) if key in one else value for key, value in other.items()}
    return [*one, *other] if isinstance(one, list) else other


def _long(node: Any, names: Mapping[str, str]) -> Any:
    """Expands the short forms of openapi.yaml. `names`: of the Structs that have another name in the contract."""
    if isinstance(node, list):
        return [_long(each, names) for each in node]
    if not isinstance(node, dict):
        return node
    node = dict(node)
    if "json" in node:
        example = {"example": node.pop("example")} if "example" in node else {}
        node["content"] = {"application/json": {"schema": _schema(node.pop("json")), **example}}
    if isinstance(node.get("headers"), list):
        node["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in node["headers"]}
    if isinstance(node.get("parameters"), list):
        shorts = node["parameters"]
        node["parameters"] = [{"$ref": f"#/components/parameters/{p}"} if isinstance(p, str) else p for p in shorts]
    if isinstance(node.get("$ref"), str) and node["$ref"][0] != "#":
        node["$ref"] = f"#/components/schemas/{names.get(node['$ref'], node['$ref'])}"
    return {key: _long(value, names) for key, value in node.items()}


def _schema(short: Any) -> Any:
    if isinstance(short, list):
        return {"type": "array", "items": _schema(short[0])}
    return {"$ref": short} if isinstance(short, str) else short
