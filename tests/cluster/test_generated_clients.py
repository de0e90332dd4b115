"""Clients that others' generators make from the contract compile, and work for locks, claims, events and providers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import Cluster, clients, documents, program
from harness.clients import Call, checked, generate
from harness.cluster import ROOT
from harness.locks import Sql

SMOKE = ROOT / "tests/clients"
NODE = ROOT / ".venv/node_modules"  # `make test-all` installs these
VALIDATOR = Path("/usr/share/gocode/src/gopkg.in/validator.v2")  # Debian's package of what generated Go imports


@pytest.fixture
def port(start_cluster: Callable[..., Cluster], sql: Sql) -> int:
    """The port of an instance whose fencing tokens need more than 32 bits."""
    sql("SELECT raise_fencing_tokens()")
    return start_cluster(1).ports[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be imported."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("loom_client", "loom_models", "openapi_client"):
            del sys.modules[name]


def smoke(call: Call) -> None:
    """Locks, claims, events and providers, with what a client has to tell apart."""
    provider: dict[str, Any] = {"id": "local", "name": "Local", "attributes": {"region": "eu"}}
    assert call("createProvider", body=provider)[1]["attributes"] == {"region": "eu"}
    assert call("getProvider", "local")[1]["name"] == "Local"

    name = "deploy/ü (1)"
    status, grant = call("acquireLock", name, body={"owner": "a", "ttl_seconds": 60, "metadata": {"why": [1]}})
    assert (status, grant["lock_name"], grant["metadata"]) == (201, name, {"why": [1]})
    assert grant["fencing_token"] > 2**32
    status, refused = call("acquireLock", name, body={"owner": "b"})
    assert (status, refused["type"], refused["holder"]["owner"]) == (409, "/problems/lock-held", "a")
    assert call("getLock", name)[1]["waiting"] == 0
    renewal = {"fencing_token": grant["fencing_token"], "ttl_seconds": 30}
    assert call("renewLock", name, body=renewal)[0] == 200
    assert call("releaseLock", name, fencing_token=grant["fencing_token"])[0] == 204
    status, lost = call("renewLock", name, body=renewal)
    assert (status, lost["type"], lost["ended_how"]) == (409, "/problems/lock-lost", "released")

    assert call("createProject", body={"id": "p", "name": "p", "git_repo": "r", "branch": "main"})[0] == 201
    assert call("createAgent", body={"id": "a", "persona_name": "coder", "project_id": "p"})[0] == 201
    bead = {"id": "x", "title": "x", "project_id": "p", "context": {"branch": "fix"}}
    assert call("createBead", body=bead)[1]["context"] == {"branch": "fix"}
    status, claim = call("claimNextBead", body={"agent_id": "a"})
    assert (status, claim["bead"]["id"]) == (200, "x")
    token = claim["fencing_token"]
    assert call("sendHeartbeat", "a", body={"claims": {"x": token}})[1]["extended"].keys() == {"x"}
    status, lost = call("completeBead", "x", body={"fencing_token": token - 1})
    assert (status, lost["type"]) == (409, "/problems/claim-lost")
    assert call("completeBead", "x", body={"fencing_token": token})[1]["status"] == "closed"
    assert call("claimNextBead", body={"agent_id": "a"})[0] == 204

    page = call("readEvents", after=0)[1]
    types = [event["type"] for event in page["events"] if event["entity_id"] == "x"]
    assert types[0] == "bead.created"
    assert types[-1] == "bead.completed"
    assert call("readEvents", after=page["next"], entity_id="x")[1]["events"] == []


def test_a_client_by_openapi_python_client(folder: Path, port: int) -> None:
    pytest.importorskip("openapi_python_client", reason="needs Python 3.11")
    command = ["openapi-python-client", "generate", "--path", "openapi.yaml"]
    generate([*command, "--output-path", "loom_client", "--meta", "none"], folder)
    clients.check_types(folder, "loom_client/api", "loom_client/models")  # client.py does not depend on the contract
    smoke(clients.of_openapi_python_client(port))


def test_the_commands_of_the_page_about_clients_work(port: int, tmp_path: Path) -> None:
    pytest.importorskip("openapi_python_client", reason="needs Python 3.11")
    program("curl", "curl")
    text = (ROOT / "docs/api/clients.md").read_text()
    pairs = [(replace(block, tests=()), "…") for block in documents.blocks(text) if block.language == "sh"]
    ran = documents.run(pairs, tmp_path, {}, {8080: port})
    assert [each.fault for each in ran] == [None] * len(pairs), ran
    assert re.search("It prints `(.*)`", text)[1] in ran[-1].printed  # type: ignore[index]


def test_models_by_datamodel_code_generator(folder: Path, port: int) -> None:
    command = ["datamodel-codegen", "--input", "openapi.yaml", "--input-file-type", "openapi"]
    command += ["--output", "loom_models.py", "--output-model-type", "pydantic_v2.BaseModel"]
    generate([*command, "--use-annotated", "--set-default-enum-member", "--formatters", "builtin"], folder)
    clients.check_types(folder, "loom_models.py")
    smoke(clients.of_datamodel_code_generator(port))


def openapi_generator(folder: Path, language: str) -> Path:
    """Generate a client by openapi-generator, and return its folder."""
    if importlib.util.find_spec("openapi_generator_cli") is None:
        pytest.skip("openapi-generator-cli is not installed: make test-all installs it")
    program("java", "default-jre-headless")
    command = ["openapi-generator-cli", "generate", "-i", "openapi.yaml", "-g", language, "-o", language]
    generate(command, folder)
    return folder / language


def node(command: str) -> str:
    """The path of a program that npm has installed."""
    program("node", "nodejs")
    if not (NODE / ".bin" / command).exists():
        pytest.skip(f"{command} is not installed: make test-all installs it, if npm is there")
    return str(NODE / ".bin" / command)


@pytest.mark.all
def test_a_client_by_openapi_generator_for_python(folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    package = openapi_generator(folder, "python")
    monkeypatch.syspath_prepend(package)
    clients.check_types(package, "openapi_client")
    smoke(clients.of_openapi_generator(port))


def run_typescript(script: str, folder: Path, port: int) -> str:
    """Copy a script beside the generated code, check its types and theirs, run it, and return what it prints."""
    shutil.copy(SMOKE / f"{script}.ts", folder)
    options = ["--strict", "--skipLibCheck", "false", "--module", "commonjs", "--outDir", "compiled"]
    checked([node("tsc"), *options, "--target", "es2022", "--lib", "es2022,dom", f"{script}.ts"], folder)
    return checked(["node", f"compiled/{script}.js"], folder, LOOM_URL=f"http://127.0.0.1:{port}")


@pytest.mark.all
def test_a_client_by_openapi_generator_for_typescript(folder: Path, port: int) -> None:
    node("tsc")
    package = openapi_generator(folder, "typescript-fetch")
    assert "claimed x" in run_typescript("smoke", package, port)


@pytest.mark.all
def test_types_by_openapi_typescript(folder: Path, port: int) -> None:
    generate([node("openapi-typescript"), "openapi.yaml", "-o", "schema.d.ts"], folder)
    assert "claimed x" in run_typescript("types", folder, port)


@pytest.mark.all
def test_a_client_by_openapi_generator_for_go(folder: Path, port: int) -> None:
    program("go", "golang-go")
    if not VALIDATOR.exists():
        pytest.skip("gopkg.in/validator.v2 is not installed (Debian: apt-get install golang-gopkg-validator.v2-dev)")
    package = openapi_generator(folder, "go")
    shutil.copytree(VALIDATOR, package / "validator", ignore=shutil.ignore_patterns("*_test.go"))
    (package / "validator/go.mod").write_text("module gopkg.in/validator.v2\n")
    (package / "smoke").mkdir()
    shutil.copy(SMOKE / "smoke.go", package / "smoke/main.go")
    env = {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOTOOLCHAIN": "local"}
    checked(["go", "mod", "edit", "-go=1.19", "-replace", "gopkg.in/validator.v2=./validator"], package, **env)
    checked(["go", "vet", ".", "./smoke"], package, **env)
    assert "claimed x" in checked(["go", "run", "./smoke"], package, LOOM_URL=f"http://127.0.0.1:{port}", **env)
