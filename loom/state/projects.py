"""Projects: what agents and beads belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from loom import db, errors
from loom.db import Time
from loom.state.entities import Entity, Id, change, not_found
from loom.state.writer import Writer, call

Status = Literal["open", "closed", "reopened"]
GitStrategy = Literal["direct", "branch-pr"]
GitAuth = Literal["none", "ssh", "token", "basic", "git-helper"]


class Project(Entity, kw_only=True):
    """What agents and beads belong to. `agents` are ids, and derived."""

    kind: ClassVar[str] = "project"
    table: ClassVar[str] = "projects"
    new_id: ClassVar[str] = "'proj-' || nextval('project_numbers')"

    name: str
    description: str = ""
    git_repo: str
    branch: str
    beads_path: str
    bead_prefix: str
    parent_id: Id | None = None
    context: dict[str, Any]
    status: Status
    is_perpetual: bool
    is_sticky: bool
    agents: list[Id]
    closed_at: Time | None = None
    due_date: Time | None = None
    git_strategy: GitStrategy
    git_auth_method: GitAuth
    git_credential_id: str | None = None
    git_config_options: dict[str, Any] = {}
    work_dir: str | None = None
    last_sync_at: Time | None = None
    last_commit_hash: str | None = None


class State(msgspec.Struct):
    """Whether a project can be closed: `readiness_issues` say what speaks against it."""

    id: str
    name: str
    status: str
    is_perpetual: bool
    is_sticky: bool
    open_beads: int
    can_close: bool
    readiness_ok: bool
    readiness_issues: list[str]
    created_at: Time
    updated_at: Time
    closed_at: Time | None
    comments_count: int


def state(conn: db.Connection, key: str) -> State:
    """How a project stands. Raises NotFound."""
    row = db.one(
        conn,
        """
        SELECT id, name, status, is_perpetual, is_sticky, created_at, updated_at, closed_at,
               open_beads(id),
               (SELECT count(*) FROM comments c WHERE c.entity_type = 'project' AND c.entity_id = p.id)
                   AS comments_count
          FROM projects p WHERE id = %(key)s
        """,
        key=key,
    )
    if row is None:
        raise not_found(Project, key)
    issues = _issues(row)
    return State(**row, can_close=not issues, readiness_ok=not issues, readiness_issues=issues)


def close(conn: db.Connection, writer: Writer, key: str) -> Project:
    """Closes it if its beads are closed. A bead that is written at the same time is counted, or refused.

    Raises NotFound, Conflict with `readiness_issues`, LockHeld, LockLost.
    """
    row = call(
        conn,
        writer,
        "SELECT outcome, entity::text AS entity, detail FROM close_project(%(key)s, %(fences)s)",
        key=key,
    )
    if row["outcome"] == "not-found":
        raise not_found(Project, key)
    if row["outcome"] == "not-ready":
        raise errors.Conflict("The project cannot be closed yet.", readiness_issues=_issues(row["detail"]))
    return msgspec.json.decode(row["entity"], type=Project)


def reopen(conn: db.Connection, writer: Writer, key: str) -> Project:
    """It takes beads again. Raises NotFound, LockHeld, LockLost."""
    return change(conn, writer, Project, key, "put", {"status": "reopened"})


def _issues(found: Mapping[str, Any]) -> list[str]:
    """What speaks against closing a project."""
    issues = []
    if found["open_beads"]:
        issues.append(f"{found['open_beads']} beads are not closed")
    if found["is_perpetual"]:
        issues.append("the project is perpetual")
    return issues
