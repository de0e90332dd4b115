"""Every answer, to valid and to invalid requests, matches the OpenAPI contract, and none is a server error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import Client, Cluster
from harness.contract import document
from harness.locks import acquire
from harness.work import PROJECT, claim, make, team

if find_spec("schemathesis") is None:
    pytest.skip("needs Python 3.11", allow_module_level=True)

ROOT = Path(__file__).parents[2]
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "unsupported_method"),
)
CONTRACT = "/api/openapi.yaml"
PLENTY = 30  # entities of each kind, and as many to be deleted


def world(client: Client) -> dict[str, list[Any]]:
    """Create what the generated requests use: ids by the field that refers to them, claims and locks with their tokens.

    Nothing refers to the `doomed` entities, so that they can be deleted.
    """
    names = [f"n{i}" for i in range(PLENTY)]
    doomed = [f"d{i}" for i in range(PLENTY)]
    workers = [f"w{i}" for i in range(PLENTY // 5)]
    team(client, *names, *doomed, *workers)
    for name in (*names, *doomed):
        make(client, "/api/v1/projects", id=name, name=name, git_repo="r", branch="b")
        make(client, "/api/v1/providers", id=name, name=name)
    claimed = [f"{worker}-{i}" for worker in workers for i in range(15)]
    beads = [{"id": key, "title": "t", "project_id": PROJECT} for key in (*names, *doomed, *claimed)]
    make(client, "/api/v1/beads/bulk", beads=beads)
    for name in names:
        assert client.put(f"/api/v1/config/{name}", {"value": name}).status == 200
    files = [{"file_path": name, "project_id": PROJECT, "agent_id": name} for name in names]
    for file in files:
        make(client, "/api/v1/file-locks", **file)
    return {
        "project_id": [PROJECT, *names],
        "provider_id": names,
        "agent_id": names,
        "bead_id": names,
        "doomed": doomed,
        "key": names,
        "name": names,
        "files": [{**file, "path": file["file_path"]} for file in files],
        "claims": [(key, claim(client, key, key.partition("-")[0], lease_seconds=3600)) for key in claimed],
        "locks": [(n, acquire(client, n, owner=n, ttl_seconds=3600)["fencing_token"]) for n in names],
    }


def test_every_answer_is_described_in_the_contract(
    start_cluster: Callable[..., Cluster], tmp_path: Path, seed: int, long: bool
) -> None:
    """Every operation, with valid and invalid requests, on two instances at once: all edge cases, and random ones."""
    cluster = start_cluster(2)
    assert len({cluster.client(i).get(CONTRACT).headers["ETag"] for i in range(2)}) == 1
    (tmp_path / "world.json").write_text(json.dumps({**world(cluster.client()), "seed": [seed]}))
    runs = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run"),
                f"http://127.0.0.1:{port}{CONTRACT}",
                *("--checks", ",".join(CHECKS), "--phases", phases, "--max-examples", str(examples)),
                *("--seed", str(seed), "--generation-database", "none", "--continue-on-failure", "--no-color"),
                *("--warnings", "off", "--request-timeout", "30", "--no-shrink"),
            ],
            cwd=tmp_path,
            env={
                **os.environ,
                "SCHEMATHESIS_HOOKS": str(ROOT / "tests/harness/generated.py"),
                "CONTRACT_WORLD": str(tmp_path / "world.json"),
                "CONTRACT_SEEN": str(tmp_path / "seen"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for port, phases, examples in zip(
            cluster.ports, ("examples,coverage", "fuzzing,stateful"), (1, 300 if long else 20), strict=True
        )
    ]
    try:
        said = [run.communicate(timeout=1200 if long else 500)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, text in zip(runs, said, strict=True):
        print(text[:20_000])
        assert run.returncode == 0, text[-2000:]
    assert_reached(Counter((tmp_path / "seen").read_text().splitlines()))


def assert_reached(seen: Counter[str]) -> None:
    """Each operation succeeded at least once, except that of the contract itself, which is not called.

    Otherwise only refusals would have been checked.
    """
    operations = {
        f"{method.upper()} {path}"
        for path, item in document()["paths"].items()
        for method in item.keys() - {"parameters"}
        if path != CONTRACT
    }
    good = {line.rpartition(" ")[0] for line in seen if line.rpartition(" ")[2].startswith("2")}
    missed = operations - good
    assert not missed, {line: n for line, n in seen.items() if line.rpartition(" ")[0] in missed}
