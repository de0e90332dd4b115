"""The contract is complete and correct: clients are generated from it, and other tests check each answer against it."""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
import yaml
from flask import Flask
from harness import AppClient, contract
from harness.client import Answer
from harness.contract import document
from harness.locks import assert_problem
from werkzeug.datastructures import Headers

from loom import __version__, errors
from loom.http import parse
from loom.instances import Instance
from loom.routes import openapi

PATH = "/api/openapi.yaml"
METHODS = {"get", "put", "post", "patch", "delete"}
# Routes that read several parameters as one, since the last may contain slashes.
WHOLE = {"/api/v1/file-locks/<name:_>": "/api/v1/file-locks/<project_id>/<path>"}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document()["paths"].items():
        for method in METHODS & item.keys():
            yield method, path, item[method]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_the_document_is_served_with_an_etag(client: AppClient) -> None:
    answer = client.get(PATH)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/yaml")
    served = yaml.safe_load(answer.body)
    assert served == document()
    assert (served["openapi"], served["info"]["version"]) == ("3.1.1", __version__)
    again = client.get(PATH, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", answer.headers["ETag"])
    assert client.get(PATH, headers={"If-None-Match": '"other"'}).status == 200


def test_an_instance_that_may_be_removed_from_the_registry_serves_it(client: AppClient, instance: Instance) -> None:
    instance._last_good = float("-inf")
    with instance._beating:
        assert client.get(PATH).status == 200


def test_it_describes_each_route_and_nothing_else(app: Flask) -> None:
    routes = {
        (method.lower(), re.sub("<[^>]*>", "{}", WHOLE.get(rule.rule, rule.rule)))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert routes == {(method, re.sub("{[^}]*}", "{}", path)) for method, path, _ in operations()}


def test_it_is_valid_openapi() -> None:
    validator = pytest.importorskip("openapi_spec_validator", reason="needs Python 3.11")
    validator.OpenAPIV31SpecValidator(json.loads(json.dumps(document()))).validate()
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(names) == len(set(names))
    for method, path, operation in operations():
        assert operation["summary"], (method, path)
        assert not operation.get("requestBody") or operation["requestBody"]["content"], (method, path)


def test_every_component_is_used() -> None:
    used = set(references(document()))
    for kind, components in document()["components"].items():
        assert [name for name in components if f"#/components/{kind}/{name}" not in used] == [], kind


def test_it_describes_every_problem_with_its_status_and_title() -> None:
    def kinds(kind: type[errors.Error] = errors.Error) -> Iterator[type[errors.Error]]:
        yield kind
        for each in kind.__subclasses__():
            yield from kinds(each)

    schemas = document()["components"]["schemas"]
    told = {
        (schema["properties"]["type"]["const"], schema["properties"]["status"]["const"], schema["description"])
        for schema in schemas.values()
        if {"$ref": "#/components/schemas/Problem"} in schema.get("allOf", ())
    }
    words: dict[str, type[errors.Error]] = {}
    for kind in kinds():
        words.setdefault(kind.type, kind)
    assert told == {(f"/problems/{word}", kind.status, kind().title) for word, kind in words.items()}


def test_examples_match_their_schema() -> None:
    found = 0
    for _, _, operation in operations():
        for media in operation.get("requestBody", {}).get("content", {}).values():
            if "example" in media:
                schema = {**media["schema"], "components": document()["components"]}
                jsonschema_rs.Draft202012Validator(schema, validate_formats=True).validate(media["example"])
                found += 1
    assert found >= 15


def test_a_body_is_required_where_it_says_so(client: AppClient) -> None:
    for method, path, operation in operations():
        if "requestBody" in operation:
            answer = client.request(method.upper(), re.sub("{[^}]*}", "x", path))
            required = operation["requestBody"].get("required", False)
            assert (answer.status == 400) == required, (method, path, answer)


def test_every_example_is_accepted_as_a_body(client: AppClient) -> None:
    """The ids that it names do not exist, but the body is valid."""
    for method, path, operation in operations():
        for media in operation.get("requestBody", {}).get("content", {}).values():
            if "example" in media:
                answer = client.request(method.upper(), re.sub("{[^}]*}", "x", path), media["example"])
                wrong = answer.json.get("errors", []) if answer.status == 400 else []
                assert all("does not exist" in each["problem"] for each in wrong), (method, path, answer)


def test_the_schema_of_ids_is_the_one_that_bodies_are_checked_by() -> None:
    (schema,), _ = msgspec.json.schema_components([parse.Key])
    told = {**document()["components"]["schemas"]["Key"]}
    del told["description"]
    assert {**schema, "pattern": schema["pattern"].removesuffix("(?!\\n)")} == told


def test_an_installation_includes_it() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(openapi.__file__).parents[2] / "setup.cfg")
    assert setup["options.package_data"][openapi.__package__] == "openapi.yaml"


@pytest.mark.parametrize(
    ("method", "path", "status", "headers", "body"),
    [
        ("GET", "/api/v1/beads/x", 418, {"ETag": '"1"'}, {}),
        ("GET", "/api/v1/agents", 200, {}, {"not": "a list"}),
        ("GET", "/api/v1/agents", 200, {}, [{"id": "an agent that lacks the rest"}]),
        ("GET", "/api/v1/agents", 200, {"Content-Type": "text/html"}, []),
        ("GET", "/api/v1/agents", 200, {"ETag": '"1"'}, []),
        ("GET", "/api/v1/beads/x", 404, {}, {"type": "/problems/not-found"}),
        ("DELETE", "/api/v1/locks/a/b?fencing_token=1", 204, {}, {}),
        ("GET", "/health/live", 200, {}, {"status": "alive", "timestamp": "2026-01-01T00:00:00Z", "more": 1}),
        ("GET", "/health/live", 200, {}, {"status": "alive", "timestamp": "today"}),
    ],
)
def test_the_check_of_answers_detects_one_that_the_contract_does_not_describe(
    method: str, path: str, status: int, headers: dict[str, str], body: Any
) -> None:
    kind = "application/problem+json" if status >= 400 else "application/json"
    with pytest.raises(AssertionError):
        contract.check(
            method, path, Answer(status, Headers({"Content-Type": kind, **headers}), json.dumps(body).encode())
        )


def test_a_refusal_by_the_router_is_a_problem_of_the_same_shape(client: AppClient) -> None:
    schema = {"$ref": "#/components/schemas/Problem", "components": document()["components"]}
    for method, path, status, word in (
        ("GET", "/none", 404, "not-found"),
        ("PUT", "/health", 405, "method-not-allowed"),
    ):
        problem = assert_problem(client.request(method, path), status, word)
        jsonschema_rs.Draft202012Validator(schema).validate(problem)
