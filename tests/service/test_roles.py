"""Each role of the database can do what it is for, and no more; and Loom's tables may be in any schema."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress

import psycopg2
import pytest
from harness import Cluster, Postgres
from harness.postgres import binaries, query

from loom import db, errors
from loom.config import resource

PROJECT = {"id": "p", "name": "p", "git_repo": "r", "branch": "b"}
ROLES = ("loom_owner", "loom_app", "loom_reader")


@pytest.fixture
def roles(postgres: Postgres) -> Iterator[Callable[[str], str]]:
    """The DSN of each role, in a database in which deploy/postgres/roles.sql was run."""
    name = postgres.empty_database()
    psql = [str(binaries() / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", postgres.dsn(name)]
    for _ in range(2):
        subprocess.run([*psql, "-f", str(resource("schema.sql").parent / "deploy/postgres/roles.sql")], check=True)
    postgres.query("CREATE ROLE stranger LOGIN")
    yield lambda role: postgres.dsn(name, user=role)
    postgres.drop(name)
    for role in (*ROLES, "stranger"):
        with suppress(psycopg2.Error):
            postgres.query(f"DROP ROLE {role}")


def refused(dsn: str, statement: str) -> bool:
    try:
        query(dsn, statement)
    except (psycopg2.errors.InsufficientPrivilege, psycopg2.errors.ReadOnlySqlTransaction):
        return True
    return False


def test_the_three_roles_can_do_what_they_are_for_and_no_more(
    roles: Callable[[str], str], start_cluster: Callable[..., Cluster], postgres: Postgres
) -> None:
    owner, app, reader = map(roles, ROLES)
    with pytest.raises(errors.SchemaError):
        db.migrate(app)
    db.migrate(owner)
    cluster = start_cluster(1, dsn=app)
    client = cluster.client()
    token = client.post("/api/v1/locks/build", {"owner": "a"}).json["fencing_token"]
    assert client.delete(f"/api/v1/locks/build?fencing_token={token}").status == 204
    for path, body in (
        ("/api/v1/projects", PROJECT),
        ("/api/v1/agents", {"id": "a", "persona_name": "x", "project_id": PROJECT["id"]}),
        ("/api/v1/beads", {"id": "b", "title": "t", "project_id": PROJECT["id"]}),
        ("/api/v1/beads", {"id": "c", "title": "t", "project_id": PROJECT["id"], "blocked_by": ["b"]}),
    ):
        assert client.post(path, body, headers={"Idempotency-Key": path + body["id"]}).status == 201, path
    claim = client.post("/api/v1/beads/claim", {"agent_id": "a"}).json
    done = {"fencing_token": claim["fencing_token"], "context": {"n": 1}}
    assert client.post("/api/v1/beads/b/complete", done).status == 200
    assert client.delete("/api/v1/beads/c").status == 204
    assert client.get("/api/v1/events?after=0").json["count"] > 5

    written = {"events": "actor", "event_numbers": "id", "grants": "owner", "claims": "agent_id"}
    for table, column in {**written, "schema_version": "version"}.items():
        assert query(app, f"SELECT count(*) > 0 FROM {table}") == [(True,)]
        assert refused(app, f"UPDATE {table} SET {column} = {column}"), table
        assert refused(app, f"TRUNCATE {table}")
        assert refused(reader, f"DELETE FROM {table}")
    for table in ("grants", "claims"):
        query(app, f"DELETE FROM {table} WHERE ctid IN (SELECT ctid FROM {table} FOR UPDATE SKIP LOCKED)")  # retention
    query(app, "DELETE FROM events")
    assert refused(app, "CREATE TABLE t ()")
    assert refused(app, "ALTER TABLE events DISABLE TRIGGER ALL")
    query(reader, "SELECT * FROM instances, distributed_locks, beads, agents, feed")
    assert refused(reader, "SELECT * FROM idempotency_keys")
    with pytest.raises(psycopg2.OperationalError):
        query(roles("stranger"), "SELECT 1")

    with pytest.raises(psycopg2.Error):
        query(app, "SELECT 's3cret-value'::integer")
    with pytest.raises(psycopg2.Error):
        query(app, "INSERT INTO config VALUES ('k', '1', 's3cret-value', 1), ('k', '2', 's3cret-value', 1)")
    assert "Key (key)" not in postgres.log.read_text()
    assert "INSERT INTO config VALUES" not in postgres.log.read_text()

    query(owner, "UPDATE schema_version SET checksum = 'of an earlier Loom'")
    with pytest.raises(errors.SchemaError, match="run loom migrate as role loom_owner"):
        db.migrate(app)


def test_an_instance_warns_while_every_role_may_create_functions(
    postgres: Postgres, database_name: str, start_cluster: Callable[..., Cluster]
) -> None:
    postgres.query("GRANT CREATE ON SCHEMA public TO PUBLIC", database=database_name)
    cluster = start_cluster(1)
    cluster.wait_healthy()
    assert "schema-is-open" in cluster.masters[0].log.read_text()
    postgres.query("REVOKE CREATE ON SCHEMA public FROM PUBLIC", database=database_name)
    cluster.restart(0)
    cluster.wait_healthy()
    assert cluster.masters[0].log.read_text().count("schema-is-open") == 1


def test_the_tables_may_be_in_another_schema(postgres: Postgres, start_cluster: Callable[..., Cluster]) -> None:
    name = postgres.empty_database()
    try:
        postgres.query("CREATE SCHEMA work", database=name)
        postgres.query(f"ALTER DATABASE {name} SET search_path = work")
        client = start_cluster(1, dsn=postgres.dsn(name)).client()
        assert client.post("/api/v1/locks/build", {"owner": "a"}).status == 201
        assert client.post("/api/v1/projects", PROJECT).status == 201
        tables = "SELECT DISTINCT schemaname FROM pg_tables WHERE tablename IN ('beads', 'distributed_locks')"
        assert postgres.query(tables, database=name) == [("work",)]
    finally:
        postgres.drop(name)
