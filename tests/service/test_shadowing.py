"""No other role of the database, and no name that a client chooses, gets between Loom and its database."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg2
import pytest
from harness import AppClient, Postgres
from harness.locks import Sql, assert_problem
from harness.postgres import query
from psycopg2.extensions import make_dsn

CALLS = """
CREATE TABLE shadowed (what text);
GRANT INSERT ON shadowed TO PUBLIC;
CREATE FUNCTION hashtextextended(name text, seed integer) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.shadowed VALUES (current_user || ' locks ' || name);
    RETURN pg_catalog.hashtextextended(name, seed);
END $$;
CREATE FUNCTION hashtext(name uuid) RETURNS integer LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.shadowed VALUES (current_user || ' hashes ' || name);
    RETURN 1;
END $$;
"""


@pytest.fixture
def stranger(postgres: Postgres, database_name: str) -> Iterator[str]:
    """The DSN of a role that may do what every role may do before PostgreSQL 15."""
    postgres.query("CREATE ROLE stranger LOGIN")
    postgres.query("GRANT CREATE ON SCHEMA public TO PUBLIC", database=database_name)
    yield make_dsn(postgres.dsn(database_name), user="stranger")
    postgres.query("DROP OWNED BY stranger", database=database_name)
    postgres.query("DROP ROLE stranger")


def test_a_function_of_a_stranger_is_not_called_with_looms_rights(stranger: str, client: AppClient, sql: Sql) -> None:
    query(stranger, CALLS)
    key = {"Idempotency-Key": "k"}
    token = client.post("/api/v1/locks/build", {"owner": "a"}, headers=key).json["fencing_token"]
    client.put("/api/v1/locks/build", {"fencing_token": token})
    client.delete(f"/api/v1/locks/build?fencing_token={token}")
    client.post("/api/v1/projects", {"id": "p", "name": "p", "git_repo": "r", "branch": "b"})
    client.post("/api/v1/agents", {"id": "a", "persona_name": "x", "project_id": "p"})
    client.post("/api/v1/beads", {"id": "b", "title": "t", "project_id": "p"})
    assert client.post("/api/v1/beads/claim", {"agent_id": "a"}).status == 200
    client.post("/api/v1/file-locks", {"file_path": "f", "project_id": "p", "agent_id": "a"})
    client.put("/api/v1/config/k", {"value": 1})
    assert sql("SELECT * FROM shadowed") == []


def test_a_lock_cannot_have_the_key_of_one_of_looms_own(client: AppClient, sql: Sql, stranger: str) -> None:
    """A name is hashed to one number; Loom's own locks have two, which is another space of keys."""
    client.put("/api/v1/config/k", {"value": 1})
    with psycopg2.connect(stranger) as session, session.cursor() as cursor:
        for name in ("loom:events", "loom:config", "loom:bead-graph"):
            cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (name,))
        (before,) = sql("SELECT max(id) FROM event_numbers")[0]
        assert client.put("/api/v1/config/k", {"value": 2}).status == 200
        assert client.get("/api/v1/events?after=0").json["next"] > (before or 0)


@pytest.mark.parametrize("name", ["loom:upkeep", "loom:", "loom:other/one"])
def test_nobody_takes_renews_or_ends_looms_own_locks_over_http(client: AppClient, sql: Sql, name: str) -> None:
    path = f"/api/v1/locks/{name}"
    assert_problem(client.post(path, {"owner": "me"}), 400, "invalid")
    sql("SELECT acquire_lock(%s, 'instance:1', NULL, '1 hour', NULL, false)", name)
    token = client.get(path).json["fencing_token"]
    for answer in (
        client.put(path, {"fencing_token": token}),
        client.delete(f"{path}?fencing_token={token}"),
        client.delete(f"{path}?fencing_token={token}&force=true&reason=x"),
        client.put("/api/v1/config/k", {"value": 1}, headers={"Loom-Lock-Token": f'{token}; lock="{name}"'}),
    ):
        assert_problem(answer, 400, "invalid")
    assert client.get(path).json["fencing_token"] == token
