"""File locks: who works on which file of a project, until when. Each is a lock of distributed_locks."""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta

import msgspec

from loom import db, errors, locks
from loom.db import Time
from loom.locks.grants import COLUMNS
from loom.state.writer import Writer, call

LONGEST_NAME = 255


class File(msgspec.Struct, frozen=True):
    """One file of one project."""

    project_id: str
    path: str

    @property
    def lock_name(self) -> str:
        """file:PROJECT:PATH, the project's colons escaped, or a hash of that when it is longer than a name may be.

        No two files share a name: no project's id is empty, as that before a hash is.
        """
        project = self.project_id.replace("%", "%25").replace(":", "%3A")
        name = f"file:{project}:{self.path}"
        return name if len(name) <= LONGEST_NAME else f"file::{hashlib.sha256(name.encode()).hexdigest()}"


class FileLock(msgspec.Struct, frozen=True):
    """One holding of a file. `bead_id`: the bead with whose claim it ends; empty when it is for none.

    `lock_name` and `fencing_token` fence writes: they go into Loom-Lock-Token, or loom_fence() in SQL.
    """

    file_path: str
    project_id: str
    agent_id: str
    bead_id: str
    locked_at: Time
    expires_at: Time
    fencing_token: int
    lock_name: str


def of_grant(grant: locks.Grant) -> FileLock:
    about = {name: grant.metadata.get(name, "") for name in ("file_path", "project_id", "agent_id", "bead_id")}
    return FileLock(
        **about,
        locked_at=grant.acquired_at,
        expires_at=grant.expires_at,
        fencing_token=grant.fencing_token,
        lock_name=grant.lock_name,
    )


def take(
    conn: db.Connection, writer: Writer, file: File, agent: str, bead: str | None, ttl: timedelta
) -> tuple[FileLock, bool]:
    """Locks the file for the agent, and says whether the lock is new: its own of before is extended, never shortened.

    bead: one that the agent has claimed; the lock ends with the claim. Without one, what it was for before stays.
    Raises LockHeld, ClaimLost, LockLost, Invalid for an unknown project, agent or bead.
    """
    about = {"file_path": file.path, "project_id": file.project_id, "agent_id": agent}
    row = call(
        conn,
        writer,
        """
        SELECT outcome, held, detail FROM take_file_lock(%(name)s, %(about)s, %(instance)s, %(ttl)s, %(fences)s)
        """,
        name=file.lock_name,
        about=json.dumps(about if bead is None else {**about, "bead_id": bead}),
        instance=writer.instance_id,
        ttl=ttl,
    )
    outcome = row["outcome"]
    if outcome == "promised":
        raise errors.LockHeld("file is promised to who waits for its lock", lock_name=file.lock_name, holder=None)
    grant = msgspec.convert(row["held"], locks.Grant)
    if outcome == "held":
        by = grant.metadata.get("agent_id") or grant.owner
        raise errors.LockHeld(f"file already locked by agent {by}", lock_name=file.lock_name, holder=grant)
    return of_grant(grant), outcome == "new"


def release(conn: db.Connection, writer: Writer, file: File, agent: str) -> None:
    """Ends the agent's lock of the file; a repetition by the proxy does no harm. Raises NotFound, LockLost."""
    row = call(
        conn,
        writer,
        "SELECT release_file_lock(%(name)s, %(agent)s, %(fences)s) AS done",
        name=file.lock_name,
        agent=agent,
    )
    if not row["done"]:
        raise errors.NotFound(f"{file.path} is not locked by agent {agent}", lock_name=file.lock_name)


def some(conn: db.Connection, *, project: str | None, after: str, limit: int) -> db.Page[FileLock]:
    """Those that are held, of all projects or one, in the order of their locks' names, those after `after` only."""
    sql = f"""
        SELECT row_to_json(g)::text FROM (
            SELECT {COLUMNS} FROM distributed_locks
             WHERE lock_name > %(after)s AND lock_name >= 'file:' AND lock_name < 'file;'
               AND expires_at > clock_timestamp() AND metadata ?& '{{file_path,project_id,agent_id}}'
               AND (%(project)s IS NULL OR metadata ->> 'project_id' = %(project)s)
             ORDER BY lock_name LIMIT %(most_rows)s + 1) AS g
        """
    read = msgspec.json.Decoder(locks.Grant).decode
    return db.Page(conn, lambda row: of_grant(read(row)), sql, limit, after=after, project=project)
