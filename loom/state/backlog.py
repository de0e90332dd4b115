"""The work that is there: what is ready, whose lease ends next, what waits for what, and what each agent has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loom import db

DEPTH = 5  # levels of a tree that are shown
NODES = 100  # beads of it that are shown


@dataclass
class Node:
    """A bead in a tree of those that wait for each other. `more`: some of those below it are not shown."""

    id: str
    title: str
    status: str
    assigned_to: str | None
    reason: str | None
    depth: int
    below: list[Node] = field(default_factory=list)
    more: bool = False


_BEAD = """b.id, b.title, b.status, b.priority, b.project_id, b.assigned_to, b.lease_expires_at, b.attempts, b.due_date,
    b.created_at"""


def ready(conn: db.Connection, limit: int) -> list[db.Row]:
    """The beads that the next claims get, without those that are reserved for an agent: the best first."""
    return db.rows(
        conn,
        f"""
        SELECT {_BEAD} FROM beads b
         WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
         ORDER BY priority, COALESCE(due_date, 'infinity'), created_at LIMIT %(limit)s
        """,
        limit=limit,
    )


def lapsing(conn: db.Connection, limit: int) -> list[db.Row]:
    """The claimed beads whose leases end next."""
    return db.rows(
        conn,
        f"""
        SELECT {_BEAD} FROM beads b WHERE status = 'in_progress' AND wakes_at(not_before, lease_expires_at) IS NOT NULL
         ORDER BY wakes_at(not_before, lease_expires_at) LIMIT %(limit)s
        """,
        limit=limit,
    )


def stuck(conn: db.Connection, after: str, limit: int) -> list[str]:
    """Beads with the status `blocked`, in the order of their ids: nobody will work on them until a person says so."""
    sql = "SELECT id FROM beads WHERE status = 'blocked' AND id > %(after)s ORDER BY id LIMIT %(limit)s"
    return [row["id"] for row in db.rows(conn, sql, after=after, limit=limit)]


def held_by(conn: db.Connection, agents: Sequence[str], each: int) -> dict[str, list[db.Row]]:
    """By agent, the beads that it works on, at most `each`."""
    rows = db.rows(
        conn,
        f"""
        SELECT a.id AS agent, b.* FROM unnest(%(agents)s::text[]) AS a (id) CROSS JOIN LATERAL (
            SELECT {_BEAD} FROM beads b WHERE b.assigned_to = a.id AND b.status = 'in_progress'
             ORDER BY b.id LIMIT %(each)s) AS b
        """,
        agents=list(agents),
        each=each,
    )
    found: dict[str, list[db.Row]] = {}
    for row in rows:
        found.setdefault(row["agent"], []).append(row)
    return found


def trees(conn: db.Connection, roots: Sequence[str], *, up: bool) -> list[Node]:
    """For each bead the tree of those that wait for it (up), or of those that it waits for: NODES in all, the nearest
    first. One that is reached in two ways is shown twice."""
    rows = db.rows(
        conn,
        f"""
        WITH RECURSIVE tree (id, path, depth) AS (
            SELECT id, ARRAY[id], 0 FROM unnest(%(roots)s::text[]) AS r (id)
            UNION ALL
            SELECT next.id, tree.path || next.id, tree.depth + 1
              FROM tree CROSS JOIN next_beads(tree.id, %(up)s) AS next (id)
             WHERE next.id <> '' AND tree.depth < {DEPTH} AND next.id <> ALL (tree.path))
        SELECT t.path, t.depth, b.id, b.title, b.status, b.assigned_to, b.blocked_reason AS reason
          FROM (SELECT * FROM tree LIMIT {NODES} + 1) AS t JOIN beads b ON b.id = t.id
         ORDER BY t.depth, b.status = 'closed', b.id
        """,
        roots=list(roots),
        up=up,
    )
    nodes: dict[tuple[str, ...], Node] = {}
    found: list[Node] = []
    for row in rows:
        path = tuple(row.pop("path"))
        node = nodes[path] = Node(**row)
        if len(path) == 1:
            found.append(node)
        elif path[:-1] in nodes:
            nodes[path[:-1]].below.append(node)
    for node in nodes.values():
        node.more = len(rows) > NODES and not node.below and node.depth < DEPTH
    return found


def claims_of(conn: db.Connection, bead: str, limit: int) -> list[db.Row]:
    """The claims of a bead that have ended, the newest first."""
    return db.rows(
        conn,
        "SELECT * FROM claims WHERE bead_id = %(bead)s ORDER BY fencing_token DESC LIMIT %(limit)s",
        bead=bead,
        limit=limit,
    )
