"""Requests that create agents and beads and claim them, and checks of the results."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from harness.client import Answer, Methods
from harness.locks import Sql, assert_problem

BEADS = "/api/v1/beads"
AGENTS = "/api/v1/agents"
PROJECT = "p"


def make(client: Methods, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, body)
    assert answer.status == 201, answer
    return answer.json


def team(client: Methods, *agents: str) -> None:
    """Create a project with agents."""
    make(client, "/api/v1/projects", id=PROJECT, name="p", git_repo="r", branch="main")
    for agent in agents:
        make(client, AGENTS, id=agent, persona_name="worker", project_id=PROJECT)


def bead(client: Methods, key: str, **fields: Any) -> dict[str, Any]:
    return make(client, BEADS, **{"id": key, "title": key, "project_id": PROJECT, **fields})


def get(client: Methods, key: str) -> dict[str, Any]:
    answer = client.get(f"{BEADS}/{quote(key)}")
    assert answer.status == 200, answer
    return answer.json


def patch(client: Methods, key: str, **fields: Any) -> dict[str, Any]:
    answer = client.request("PATCH", f"{BEADS}/{quote(key)}", fields)
    assert answer.status == 200, answer
    return answer.json


def ask(client: Methods, key: str, agent: str = "a", **more: Any) -> Answer:
    """Claim one bead, and return the answer."""
    headers = more.pop("headers", None)
    return client.post(f"{BEADS}/{quote(key)}/claim", {"agent_id": agent, **more}, headers=headers)


def claim(client: Methods, key: str, agent: str = "a", **more: Any) -> int:
    """Claim one bead, and return the fencing token."""
    answer = ask(client, key, agent, **more)
    assert answer.status == 200, answer
    assert answer.json["status"] == "claimed"
    return answer.json["fencing_token"]


def claim_next(client: Methods, agent: str = "a", **more: Any) -> str | None:
    """Claim the next bead, and return its id, or None."""
    answer = client.post(f"{BEADS}/claim", {"agent_id": agent, **more})
    assert answer.status in (200, 204), answer
    return answer.json["bead"]["id"] if answer.status == 200 else None


def renew(client: Methods, key: str, token: int, **more: Any) -> Answer:
    return client.put(f"{BEADS}/{key}/claim", {"fencing_token": token, **more})


def release(client: Methods, key: str, token: int, **more: Any) -> Answer:
    return client.delete(f"{BEADS}/{key}/claim?fencing_token={token}", **more)


def complete(client: Methods, key: str, token: int, **more: Any) -> Answer:
    headers = more.pop("headers", None)
    return client.post(f"{BEADS}/{key}/complete", {"fencing_token": token, **more}, headers=headers)


def fail(client: Methods, key: str, token: int, **more: Any) -> Answer:
    return client.post(f"{BEADS}/{key}/fail", {"fencing_token": token, **more})


def beat(client: Methods, agent: str = "a", **body: Any) -> dict[str, Any]:
    answer = client.post(f"{AGENTS}/{quote(agent)}/heartbeat", body)
    assert answer.status == 200, answer
    return answer.json


def lapse(sql: Sql, *keys: str) -> None:
    """End the leases of these beads now."""
    sql(
        "UPDATE beads SET lease_expires_at = clock_timestamp() WHERE id = ANY (%s) AND fencing_token IS NOT NULL",
        list(keys),
    )


def assert_lost(answer: Answer, how: str | None, holder: str | None = None) -> None:
    problem = assert_problem(answer, 409, "claim-lost", ended_how=how)
    assert (problem["ended_at"] is None) == (how is None)
    assert (problem["holder"] and problem["holder"]["agent_id"]) == holder
    assert problem["detail"]


COUNTED = [
    # the number of claims of an agent
    """
    SELECT id, open_claims FROM agents a WHERE open_claims <> (
        SELECT count(*) FROM beads b WHERE b.assigned_to = a.id AND b.fencing_token IS NOT NULL)
    """,
    # the numbers of open blockers and children of a bead
    """
    SELECT id, status, blocked_by, open_blockers, open_children FROM beads b
     WHERE open_blockers <> (SELECT count(*) FROM beads x WHERE x.id = ANY (b.blocked_by) AND x.status <> 'closed')
        OR open_children <> (SELECT count(*) FROM beads c WHERE c.parent = b.id AND c.status <> 'closed')
        OR NOT blocked_by <@ ARRAY(SELECT id FROM beads)
    """,
    # the index of blocked_by
    "SELECT blocker_id, bead_id FROM bead_blockers EXCEPT SELECT unnest(blocked_by), id FROM beads",
    "SELECT unnest(blocked_by), id FROM beads EXCEPT SELECT blocker_id, bead_id FROM bead_blockers",
    # every version has one event, in order; after a deletion versions start at 1 again
    """
    SELECT entity_type, entity_id, version, type FROM (
        SELECT *, lag(version) OVER w AS before, lag(type) OVER w AS type_before FROM events
        WINDOW w AS (PARTITION BY entity_type, entity_id ORDER BY place)) AS e
     WHERE version <> CASE WHEN before IS NULL OR type_before LIKE '%.deleted' THEN 1 ELSE before + 1 END
    """,
    *(
        f"""
        SELECT '{kind}', COALESCE(t.id, e.entity_id), t.version, e.version
          FROM {kind}s t FULL JOIN (
              SELECT DISTINCT ON (entity_id) * FROM events WHERE entity_type = '{kind}'
               ORDER BY entity_id, place DESC) AS e ON e.entity_id = t.id
         WHERE CASE WHEN t.id IS NULL THEN e.type NOT LIKE '%.deleted' ELSE e.version IS DISTINCT FROM t.version END
        """
        for kind in ("provider", "project", "agent", "bead", "comment")
    ),
]


def assert_counted(sql: Sql) -> None:
    """Every counter and index equals what a recount gives."""
    each = ", ".join(f"(SELECT json_agg(wrong) FROM ({query}) AS wrong)" for query in COUNTED)
    wrong = [rows for rows in sql(f"SELECT {each}")[0] if rows is not None]
    assert not wrong, wrong


def seed_beads(sql: Sql, count: int, blocked_by: str = "'{}'", key: str = "'b' || n", **columns: str) -> None:
    """Write many open beads, without triggers and events. Each argument is SQL of `n`, which counts from 0."""
    values = {"id": key, "title": "'t'", "project_id": f"'{PROJECT}'", "blocked_by": blocked_by, **columns}
    sql(
        f"""
        SET session_replication_role = replica;
        INSERT INTO beads ({", ".join(values)})
            SELECT {", ".join(values.values())} FROM generate_series(0, {count - 1}) AS n;
        INSERT INTO bead_blockers SELECT id, unnest(blocked_by) FROM beads ON CONFLICT DO NOTHING;
        UPDATE beads b SET open_blockers = c.n
          FROM (SELECT bead_id, count(*) AS n FROM bead_blockers JOIN beads ON id = blocker_id
                 WHERE status <> 'closed' GROUP BY 1) AS c WHERE c.bead_id = b.id;
        UPDATE beads b SET open_children = c.n
          FROM (SELECT parent, count(*) AS n FROM beads WHERE status <> 'closed' GROUP BY 1) AS c WHERE c.parent = b.id;
        ANALYZE beads, bead_blockers;
        """
    )
