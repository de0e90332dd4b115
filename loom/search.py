"""Finds locks, beads, agents and instances by the beginning of their name or id."""

from __future__ import annotations

from typing import NamedTuple

from loom import db
from loom.locks.grants import end_of_prefix

MOST = 10  # of each kind


class Found(NamedTuple):
    """kind: lock, bead, agent or instance. about: what tells it from others."""

    kind: str
    key: str
    about: str


def search(conn: db.Connection, beginning: str) -> list[Found]:
    """At most MOST of each kind: four short reads of an index; of agents, which are few, all names are compared."""
    begins = "{0} >= %(first)s AND (%(end)s IS NULL OR {0} < %(end)s)"
    sql = f"""
        (SELECT 'lock' AS kind, lock_name AS key, owner AS about FROM distributed_locks
          WHERE {begins.format("lock_name")} AND expires_at > clock_timestamp() ORDER BY lock_name LIMIT {MOST})
        UNION ALL
        (SELECT 'bead', id, title FROM beads WHERE {begins.format("id")} ORDER BY id LIMIT {MOST})
        UNION ALL
        (SELECT 'agent', id, name FROM agents
          WHERE {begins.format("id")} OR starts_with(lower(name), lower(%(first)s)) ORDER BY id LIMIT {MOST})
        UNION ALL
        (SELECT 'instance', instance_id::text, hostname || ':' || COALESCE(metadata ->> 'port', '?') FROM instances
          WHERE starts_with(instance_id::text, lower(%(first)s)) OR starts_with(hostname, %(first)s)
          ORDER BY started_at LIMIT {MOST})
        """
    rows = db.rows(conn, sql, first=beginning, end=end_of_prefix(beginning))
    return [Found(**row) for row in rows]
