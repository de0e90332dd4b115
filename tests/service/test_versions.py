"""Loom on other versions of PostgreSQL than the one that the other tests run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cluster, Postgres
from harness.locks import acquire, release
from harness.work import PROJECT, bead, claim_next, team

import loom
from loom import db

OLDEST = Path(loom.__file__).parents[1] / "var" / "postgresql-12" / "bin"  # where .ci/run puts it
FOLDERS = [OLDEST, *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]


@pytest.mark.parametrize("programs", FOLDERS, ids=lambda folder: folder.parent.name)
def test_loom_works_on_this_version(
    start_postgres: Callable[..., Postgres], start_cluster: Callable[..., Cluster], programs: Path
) -> None:
    if not (programs / "postgres").exists():
        pytest.skip(f"there is no PostgreSQL in {programs}; .ci/run puts it there")
    server = start_postgres(programs=programs)
    name = server.empty_database()
    db.migrate(server.dsn(name))
    server.query("UPDATE schema_version SET checksum = NULL", database=name)
    cluster = start_cluster(1, dsn=server.dsn(name))  # applies the schema once more
    client = cluster.client()

    team(client, "a")
    bead(client, "first")
    bead(client, "second", blocked_by=["first"])
    assert claim_next(client, "a") == "first"
    token = client.get("/api/v1/beads/first").json["fencing_token"]
    assert client.post("/api/v1/beads/first/complete", {"fencing_token": token}).status == 200
    assert claim_next(client, "a") == "second"
    assert client.patch("/api/v1/beads/second", {"context": {"k": 1}}).status == 200

    grant = acquire(client, "build", owner="one")
    assert client.post("/api/v1/locks/build", {"owner": "two", "wait_seconds": 1}).status == 409
    assert release(client, grant["fencing_token"]).status == 204
    file = {"project_id": PROJECT, "file_path": "a.py", "agent_id": "a", "bead_id": "second"}
    assert client.post("/api/v1/file-locks", file).status == 201
    assert client.delete(f"/api/v1/projects/{PROJECT}").status == 409

    types = [event["type"] for event in client.get("/api/v1/events?after=0").json["events"]]
    assert types[:4] == ["project.created", "agent.spawned", "bead.created", "bead.created"]
    assert "bead.completed" in types
