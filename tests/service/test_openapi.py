"""The contract is complete and correct: clients are generated from it, and other tests check each answer against it."""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jsonschema_rs
import msgspec
import pytest
import yaml
from flask import Flask
from harness import AppClient, clients, contract
from harness.client import Answer
from harness.contract import document
from harness.locks import Sql, assert_problem
from harness.work import PROJECT, team
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
        if not rule.endpoint.startswith("page")  # the operator's
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


def schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Every part of the document that may be a schema."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from schemas(value)
    elif isinstance(node, list):
        for value in node:
            yield from schemas(value)


def test_the_parameters_of_the_path_come_first() -> None:
    """They are the first arguments of generated functions."""
    places = ["path", "query", "header"]
    for method, path, operation in operations():
        order = [places.index(contract.resolved(parameter)["in"]) for parameter in operation["parameters"]]
        assert order == sorted(order), (method, path)
        assert order.count(0) == path.count("{"), (method, path)


def test_a_free_object_takes_any_key() -> None:
    """Some generators make a class without members of `type: object`."""
    for schema in schemas(document()):
        if "object" in (schema.get("type") or ()) and isinstance(schema.get("type"), str | list):
            assert schema.keys() & {"properties", "additionalProperties"}, schema


def test_a_large_integer_is_described_as_one_of_64_bits() -> None:
    """Go and Java use 32 bits otherwise, and a fencing token has more after a restore."""
    integers = [s for s in schemas(document()) if s.get("type") in ("integer", ["integer", "null"]) and "enum" not in s]
    assert len(integers) > 50
    for schema in integers:
        assert schema.get("maximum", 2**53) < 2**31 or schema["format"] == "int64", schema


def test_schemas_are_combined_only_where_generators_understand_it() -> None:
    """Not beside properties, and of several objects one is chosen by a discriminator that has them all."""
    for schema in schemas(document()):
        assert "allOf" not in schema
        combined = schema.keys() & {"anyOf", "oneOf"}
        assert not combined or schema.keys() <= {*combined, "description", "discriminator", "default"}, schema
        if "oneOf" in schema:
            chosen = schema["discriminator"]
            assert chosen["propertyName"] == "type"
            assert sorted(chosen["mapping"].values()) == sorted(part["$ref"] for part in schema["oneOf"])
        for part in schema.get("anyOf", ()):
            assert part == {"type": "null"} or part.keys() == {"$ref"}, schema


def test_a_status_with_several_problems_has_a_discriminator() -> None:
    several = 0
    for _, _, operation in operations():
        for response in operation["responses"].values():
            media = contract.resolved(response).get("content", {}).get("application/problem+json")
            if media:
                schema = contract.resolved(media["schema"])
                several += "discriminator" in schema
                assert "discriminator" in schema or schema["properties"]["type"]["enum"], schema
    assert several > 50


def test_names_of_components_are_no_names_of_generated_code() -> None:
    """Go makes a function NewX of each X; openapi-python-client uses the name of a class for a variable."""
    components = document()["components"]["schemas"]
    assert [name for name in components if name.removeprefix("New") in components.keys() - {name}] == []
    for name, schema in components.items():
        assert clients.snake(name) not in schema.get("properties", {}), name
        assert name not in ("Error", "Models"), name


def test_the_types_of_events_are_those_that_the_database_makes(sql: Sql) -> None:
    made = sql(
        """
        SELECT DISTINCT event_type(kind, op, was, becomes)
          FROM unnest('{project,provider,agent,bead,config,comment}'::text[]) AS kind,
               unnest('{INSERT,UPDATE,DELETE}'::text[]) AS op,
               unnest('{"{}", "{\\"status\\": \\"open\\"}"}'::jsonb[]) AS was,
               unnest('{"{}", "{\\"status\\": \\"closed\\"}", "{\\"status\\": \\"blocked\\"}",
                        "{\\"assigned_to\\": \\"a\\"}"}'::jsonb[]) AS becomes
        """
    )
    told = document()["components"]["schemas"]["Event"]["properties"]["type"]["enum"]
    imported = [kind for kind in told if kind.endswith(".imported")]  # written by loom/transfer
    assert sorted(told) == sorted([*imported, *(kind for (kind,) in made)])


def test_options_answers_the_methods_of_the_contract_for_every_path(client: AppClient) -> None:
    for path, item in document()["paths"].items():
        answer = client.request("OPTIONS", re.sub("{[^}]*}", "x", path))
        methods = {method.upper() for method in METHODS & item.keys()}
        also = {"OPTIONS", "HEAD"} if "GET" in methods else {"OPTIONS"}
        assert (answer.status, set(answer.headers["Allow"].split(", "))) == (200, methods | also), path


def test_a_path_of_an_operation_is_never_an_entity(client: AppClient) -> None:
    templates = [re.compile(re.sub("{[^}]*}", "[^/]+", path)) for path in document()["paths"] if path.endswith("}")]
    static = [path for path in document()["paths"] if any(t.fullmatch(path) for t in templates) and "{" not in path]
    assert len(static) >= 4
    team(client, "a")
    for path in static:
        for method in METHODS - document()["paths"][path].keys():
            answer = client.request(method.upper(), path, {})
            assert_problem(answer, 405, "method-not-allowed")
            assert set(answer.headers["Allow"].split(", ")) >= {m.upper() for m in document()["paths"][path]}
        parent, _, key = path.rpartition("/")
        if "post" in document()["paths"][parent]:
            refused = client.post(parent, {"id": key, "title": "t", "project_id": PROJECT})
            assert_problem(refused, 400, "invalid")
            assert refused.json["errors"][0]["field"] == "id"
    bulk = {"beads": [{"id": "claim", "title": "t", "project_id": PROJECT}]}
    assert_problem(client.post("/api/v1/beads/bulk", bulk), 400, "invalid")


def test_every_component_is_used() -> None:
    used = set(references(document()))
    for kind, components in document()["components"].items():
        assert [name for name in components if f"#/components/{kind}/{name}" not in used] == [], kind


def test_it_describes_every_problem_with_its_status_and_title() -> None:
    def kinds(kind: type[errors.Error] = errors.Error) -> Iterator[type[errors.Error]]:
        yield kind
        for each in kind.__subclasses__():
            yield from kinds(each)

    components = document()["components"]["schemas"]
    told = {
        (*schema["properties"]["type"]["enum"], *schema["properties"]["status"]["enum"], schema["description"])
        for schema in components.values()
        if schema.get("required", ())[:4] == ["type", "title", "status", "error"]
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


def test_a_default_may_be_sent(client: AppClient) -> None:
    """Generated clients send the defaults of the contract."""
    sent = 0
    for method, path, operation in operations():
        parameters = [contract.resolved(parameter) for parameter in operation["parameters"]]
        defaults = {p["name"]: p["schema"]["default"] for p in parameters if "default" in p["schema"]}
        if method == "get" and defaults:
            answer = client.get(f"{re.sub('{[^}]*}', 'x', path)}?{urlencode(defaults)}")
            assert answer.status in (200, 404), (path, answer)
            sent += 1
    assert sent > 5


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
    schema = document()["components"]["schemas"]["ErrorProblem"]
    every = {
        **schema,
        "properties": {**schema["properties"], "type": {"type": "string"}, "status": {"type": "integer"}},
    }
    for method, path, status, word in (
        ("GET", "/none", 404, "not-found"),
        ("PUT", "/health", 405, "method-not-allowed"),
    ):
        problem = assert_problem(client.request(method, path), status, word)
        jsonschema_rs.Draft202012Validator(every).validate(problem)
