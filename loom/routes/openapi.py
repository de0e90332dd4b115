"""/api/openapi.yaml: the contract, made from openapi.yaml and from what the code already defines."""

from __future__ import annotations

import functools
import json
import operator
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
INT32 = 2**31 - 1
PLACES = ("path", "query", "header")  # the order of parameters, and so of the arguments of generated functions


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
    """The OpenAPI document, written so that the usual generators of clients understand it."""
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
        common = item.pop("parameters", [])
        for method in item:
            operation = _merged({"tags": [tag], "also": group, "parameters": common}, item[method])
            item[method] = _operation(method, operation, also, parts)
        paths[path] = item
    kinds = [pkgutil.resolve_name(place) for place in structs.values()]
    references, found = msgspec.json.schema_components(kinds, ref_template="{name}")
    names = {reference["$ref"]: name for reference, name in zip(references, structs, strict=True)}
    parts["schemas"] |= {
        names.get(name, name): {**schema, "title": names.get(name, name)} for name, schema in found.items()
    }
    every = problems.pop("every")
    parts["schemas"] |= {f"{name}Problem": _problem(getattr(errors, name), every, problems[name]) for name in problems}
    for item in paths.values():
        for operation in item.values():
            _name_bodies(operation, parts["schemas"])
    given["info"]["version"] = __version__
    return _used(_simple(_long({**given, "paths": paths}, names)))


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
    method: str, operation: dict[str, Any], also: Mapping[str, Any], parts: dict[str, Any]
) -> dict[str, Any]:
    """The operation with the parts that `also` adds, and with one response for each status of its problems."""
    for group in ("every", method, *(["body"] if "requestBody" in operation else []), *operation.pop("also", [])):
        operation = _merged(operation, also.get(group, {}))
    given = [(parts["parameters"][p] if isinstance(p, str) else p, p) for p in operation["parameters"]]
    operation["parameters"] = [short for place in PLACES for full, short in given if full["in"] == place]
    answers = operation["responses"]
    for answer in answers.values() if method == "post" else ():
        answer["headers"] = [*answer.get("headers", []), "Idempotency-Replayed"]
    kinds = [getattr(errors, name) for name in sorted(set(operation.pop("problems")))]
    for status in sorted({kind.status for kind in kinds}):
        these = [kind for kind in kinds if kind.status == status]
        name = "Or".join(f"{kind.__name__}Problem" for kind in these)
        if len(these) > 2:
            name = f"{_class(operation)}{status}"
        schemas = [{"$ref": f"#/components/schemas/{kind.__name__}Problem"} for kind in these]
        mapping = {f"/problems/{kind.type}": schema["$ref"] for kind, schema in zip(these, schemas, strict=True)}
        if len(these) > 1:
            parts["schemas"][name] = {
                "oneOf": schemas,
                "discriminator": {"propertyName": "type", "mapping": mapping},
            }
        parts["responses"][name] = {
            "description": " Or: ".join(kind().title for kind in these),
            "headers": ["Retry-After"] if any(kind.retry_after for kind in these) else [],
            "content": {"application/problem+json": {"schema": {"$ref": name}}},
        }
        answers[str(status)] = {"$ref": f"#/components/responses/{name}"}
    return operation


def _problem(kind: type[errors.Error], every: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    known = {"type": {"enum": [f"/problems/{kind.type}"]}, "status": {"enum": [kind.status]}}
    return _merged(_merged({"description": kind().title, **every}, {"properties": known}), more)


def _class(operation: Mapping[str, Any]) -> str:
    return operation["operationId"][0].upper() + operation["operationId"][1:]


def _name_bodies(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Makes a component of each body that is described in place or composed by `allOf`.

    Generators understand `allOf` only if nothing else stands beside it. The name is the `title`, or the operation's.
    """
    for holder in (operation.get("requestBody", {}), *operation["responses"].values()):
        body = holder.get("json")
        if isinstance(body, dict) and body.keys() & {"allOf", "properties"}:
            name = body.get("title") or _class(operation)
            every = [schemas[part["$ref"]] if "$ref" in part else part for part in [*body.pop("allOf", []), body]]
            properties = {key: value for part in every for key, value in part.get("properties", {}).items()}
            required = [key for part in every for key in part.get("required", [])]
            for key in body.get("required", ()) if every[0] is not body else ():
                properties[key] = properties[key].get("anyOf", [properties[key]])[0]  # not null
            schemas[name] = functools.reduce(operator.or_, every) | {"properties": properties, "required": required}
            schemas[name]["title"] = name
            holder["json"] = name


def _simple(node: Any) -> Any:
    """Rewrites what some generators misunderstand, without a change of meaning."""
    if isinstance(node, list | tuple):  # of a default
        return [_simple(each) for each in node]
    if not isinstance(node, dict):
        return node
    node = {key: _simple(value) for key, value in node.items()}
    any_of = node.get("anyOf", ())
    if len(any_of) == 2 and all("enum" in each for each in any_of):
        node["enum"] = [value for each in node.pop("anyOf") for value in each["enum"]]
    elif len(any_of) == 2 and any_of[1] == {"type": "null"} and isinstance(any_of[0].get("type"), str):
        one = node.pop("anyOf")[0]
        node |= one | {"type": [one["type"], "null"]} | ({"enum": [*one["enum"], None]} if "enum" in one else {})
    if isinstance(node.get("enum"), list) and "type" not in node:
        types = {type(value) for value in node["enum"]}
        names = [name for kind, name in ((str, "string"), (int, "integer"), (type(None), "null")) if kind in types]
        node["type"] = names if len(names) > 1 else names[0]
    if "object" in (node.get("type") or ()) and "properties" not in node:
        node.setdefault("additionalProperties", True)  # without it some generators make a class that has no members
    if "integer" in (node.get("type") or ()) and "enum" not in node and node.get("maximum", INT32 + 1) > INT32:
        node["format"] = "int64"  # without it, Go and Java use 32 bits, which a fencing token may exceed
    if isinstance(node.get("default"), dict) and ("type" in node or "$ref" in node):
        del node["default"]  # an object, of which some generators make invalid Go
    if isinstance(node.get("pattern"), str):
        node["pattern"] = node["pattern"].removesuffix(r"(?!\n)")  # msgspec's, for Python's meaning of $
    return node


def _used(document: dict[str, Any]) -> dict[str, Any]:
    """The document without components that nothing refers to."""
    text = json.dumps(document)
    for kind, components in document["components"].items():
        document["components"][kind] = {
            name: part for name, part in components.items() if f'"#/components/{kind}/{name}"' in text
        }
    return document


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
