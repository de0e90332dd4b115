"""/api/v1/projects: groups of beads and agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from flask import Response, request

from loom import db, errors
from loom.http import answer, entities, headers, idempotency, parse
from loom.http.entities import versioned
from loom.http.parse import Prefix
from loom.state import comments, projects
from loom.state.agents import Agent
from loom.state.comments import ProjectComment
from loom.state.entities import Conditions, change, get
from loom.state.projects import GitAuth, GitStrategy, Project, Status
from loom.state.writer import Writer

ProjectBody = entities.body_of(
    Project,
    without=("agents", "closed_at"),
    bead_prefix=Prefix,
    status=Status | Literal[""],
    git_strategy=GitStrategy | Literal[""],
    git_auth_method=GitAuth | Literal[""],
)


def _adapt(patch: dict[str, Any], key: str | None) -> None:
    """An empty string changes nothing, as in the original; in a PATCH (not in the original), it clears the field."""
    for field in [field for field, value in patch.items() if value == ""]:
        if request.method != "PATCH":
            del patch[field]
        elif field in ("name", "status", "git_strategy", "git_auth_method"):
            raise errors.Invalid.field(field, "must not be empty")
        elif field == "parent_id":
            patch[field] = None


KIND = entities.Kind(
    Project,
    ProjectBody,
    required=("name", "git_repo", "branch"),
    filters=("status", "parent_id"),
    original=frozenset({"POST", "PUT"}),
    adapt=_adapt,
)
bp = entities.blueprint(KIND)


class Assignment(entities.Body):
    agent_id: str = ""
    action: Literal["assign", "unassign"] = "assign"


class ProjectRemark(entities.Body):
    author_id: parse.Actor = ""
    comment: str = ""


@bp.post("/<key>/agents")
def assign(key: str) -> Response:
    """Moves an agent into the project, or out of it."""
    key, body = parse.key(key), parse.body(Assignment, required=("agent_id",))
    writer = headers.writer(f"agent:{body.agent_id}")

    def work(conn: db.Connection) -> Response:
        get(conn, Project, key)
        try:
            if body.action == "assign":
                change(conn, writer, Agent, body.agent_id, "put", {"project_id": key})
            else:
                _unassign(conn, writer, key, body.agent_id)
        except errors.NotFound:
            raise errors.Invalid.field("agent_id", f"{body.agent_id} does not exist") from None
        return versioned(get(conn, Project, key))

    return idempotency.once(work, in_transaction=True)


def _unassign(conn: db.Connection, writer: Writer, key: str, agent_id: str) -> None:
    """Takes the agent out of this project, unless it has been moved to another in the meantime."""
    while (agent := get(conn, Agent, agent_id)).project_id == key:
        try:
            change(conn, writer, Agent, agent_id, "put", {"project_id": None}, conditions=Conditions([agent.version]))
        except errors.Stale:
            continue


@bp.post("/<key>/close")
def close(key: str) -> Response:
    """Closes the project, or answers 409 with what is left to do."""
    return _move(key, projects.close)


@bp.post("/<key>/reopen")
def reopen(key: str) -> Response:
    return _move(key, projects.reopen)


def _move(key: str, move: Callable[[db.Connection, Writer, str], Project]) -> Response:
    body = parse.body(ProjectRemark, required=("author_id",))
    writer = headers.writer(f"project:{parse.key(key)}", body.author_id)

    def work(conn: db.Connection) -> Response:
        project = move(conn, writer, key)
        if body.comment:
            comments.on_project(conn, writer, key, body.author_id, body.comment)
        return versioned(project)

    return idempotency.once(work, in_transaction=True)


@bp.get("/<key>/state")
def state(key: str) -> Response:
    with db.connection() as conn:
        return answer.json(projects.state(conn, parse.key(key)))


@bp.get("/<key>/comments")
@parse.query(*parse.PAGE)
def remarks(key: str) -> Response:
    key, after = parse.key(key), parse.cursor(comments.Place)

    def page(limit: int) -> db.Page[ProjectComment]:
        get(conn, Project, key)
        return comments.some(conn, ProjectComment, key, after=after, limit=limit)

    with db.connection() as conn:
        return answer.page(page, comments.place_of)


@bp.post("/<key>/comments")
def remark(key: str) -> Response:
    key, body = parse.key(key), parse.body(ProjectRemark, required=("author_id", "comment"))
    writer = headers.writer(f"project:{key}", body.author_id)

    def work(conn: db.Connection) -> Response:
        get(conn, Project, key)
        return answer.json(comments.on_project(conn, writer, key, body.author_id, body.comment), 201)

    return idempotency.once(work, in_transaction=True)
