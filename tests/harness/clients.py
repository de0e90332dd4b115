"""Clients that others' generators make from the contract, called alike: by operation, path, body and query."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from harness.client import Client
from harness.contract import document, resolved

# (operation id, *path, body=..., **query) -> the status, and the answer as plain values
Call = Callable[..., tuple[int, Any]]

SCRIPTS = Path(sys.executable).parent


def generate(command: Sequence[str | Path], folder: Path) -> None:
    """Run a generator in `folder`, where `openapi.yaml` is the contract. Fails the test with what it prints."""
    (folder / "openapi.yaml").write_text(json.dumps(document()))  # JSON is YAML
    checked(command, folder)


def checked(command: Sequence[str | Path], folder: Path, **env: str) -> str:
    """Run a command in `folder`, and return what it prints. Fails the test with that if the command fails."""
    run = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"{command}:\n{run.stdout[-5000:]}"
    return run.stdout


def check_types(folder: Path, *packages: str) -> None:
    checked([sys.executable, "-m", "mypy", "--follow-imports", "silent", *packages], folder)


def described(operation_id: str) -> tuple[str, str, dict[str, Any]]:
    """The method, the path and the description of an operation."""
    for path, item in document()["paths"].items():
        for method, operation in item.items():
            if operation["operationId"] == operation_id:
                return method, path, operation
    raise KeyError(operation_id)


def body_class(operation_id: str) -> str:
    """The name of the component that is the body of an operation."""
    _, _, operation = described(operation_id)
    return operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]


def snake(name: str) -> str:
    return re.sub("(?<!^)(?=[A-Z])", "_", name).lower()


def of_openapi_python_client(port: int) -> Call:
    """The package `loom_client`, made by openapi-python-client."""
    package, api = importlib.import_module("loom_client"), importlib.import_module("loom_client.api")
    models = importlib.import_module("loom_client.models")
    found = {
        module.name.rpartition(".")[2]: module.name
        for module in pkgutil.walk_packages(api.__path__, "loom_client.api.")
    }
    client = package.Client(base_url=f"http://127.0.0.1:{port}")

    def call(operation_id: str, *path: str, body: Any = None, **query: Any) -> tuple[int, Any]:
        if body is not None:
            query["body"] = getattr(models, body_class(operation_id)).from_dict(body)
        function = importlib.import_module(found[snake(operation_id)]).sync_detailed
        answer = function(*path, client=client, **query)
        assert answer.parsed is not None or not answer.content, (
            f"{operation_id}: {answer.status_code} is not understood"
        )
        return answer.status_code, answer.parsed and answer.parsed.to_dict()

    return call


def of_datamodel_code_generator(port: int) -> Call:
    """The module `loom_models`, made by datamodel-codegen: it checks what is sent and what is answered."""
    models, client = importlib.import_module("loom_models"), Client(port)

    def call(operation_id: str, *path: str, body: Any = None, **query: Any) -> tuple[int, Any]:
        method, template, operation = described(operation_id)
        where = re.sub(r"\{\w+\}", "{}", template).format(*(quote(part, safe="") for part in path))
        given = None
        if body is not None:
            model = getattr(models, body_class(operation_id)).model_validate(body)
            given = model.model_dump_json(exclude_unset=True).encode()
        answer = client.request(method.upper(), f"{where}?{urlencode(query)}", given)
        (media,) = resolved(operation["responses"][str(answer.status)]).get("content", {"": None}).values()
        if media is None:
            return answer.status, None
        model = getattr(models, media["schema"]["$ref"].rpartition("/")[2]).model_validate_json(answer.body)
        return answer.status, model.model_dump(mode="json")

    return call


def of_openapi_generator(port: int) -> Call:
    """The package `openapi_client`, made by openapi-generator."""
    package = importlib.import_module("openapi_client")
    client = package.ApiClient(package.Configuration(host=f"http://127.0.0.1:{port}"))

    def call(operation_id: str, *path: str, body: Any = None, **query: Any) -> tuple[int, Any]:
        tag = described(operation_id)[2]["tags"][0]
        api = getattr(package, "".join(word.title() for word in tag.split("-")) + "Api")(client)
        if body is not None:
            name = body_class(operation_id)
            query[snake(name)] = getattr(package, name).from_dict(body)
        try:
            answer = getattr(api, f"{snake(operation_id)}_with_http_info")(*path, **query)
        except package.ApiException as exc:
            return exc.status, exc.data.to_dict()
        return answer.status_code, answer.data and answer.data.to_dict()

    return call
