"""Remarks on beads and projects, which change neither."""

from __future__ import annotations

import uuid
from typing import ClassVar

import msgspec

from loom import db
from loom.db import Time
from loom.state.beads import Bead
from loom.state.entities import E, Versioned, change, get
from loom.state.writer import Writer

MAX_DEPTH = 50  # of replies to replies as they are answered; deeper ones stand side by side


class Comment(Versioned, kw_only=True):
    """A remark on a bead; `replies` are those that name it as their parent."""

    kind: ClassVar[str] = "comment"
    table: ClassVar[str] = "comments"

    id: str
    bead_id: str
    parent_id: str | None = None
    author_id: str
    author_username: str
    content: str
    edited: bool
    replies: list[Comment] = []


class ProjectComment(Versioned, kw_only=True):
    """A remark on a project."""

    kind: ClassVar[str] = "comment"
    table: ClassVar[str] = "comments"

    id: str
    project_id: str
    author_id: str
    comment: str
    timestamp: Time


def on_bead(conn: db.Connection, writer: Writer, bead_id: str, content: str, parent_id: str | None) -> Comment:
    """Adds one, by the writer. Raises NotFound for the bead, Invalid for a parent that is not there."""
    bead = get(conn, Bead, bead_id)
    return _add(conn, writer, Comment, "bead", bead.id, bead.project_id, writer.actor or "", content, parent_id)


def of_bead(conn: db.Connection, bead_id: str) -> list[Comment]:
    """All of a bead, oldest first, replies under what they reply to. Raises NotFound."""
    get(conn, Bead, bead_id)
    rows = db.rows(
        conn,
        """
        SELECT as_json(c)::text AS it FROM comments c WHERE entity_type = 'bead' AND entity_id = %(bead)s
         ORDER BY created_at, id
        """,
        bead=bead_id,
    )
    found = {c.id: c for c in (msgspec.json.decode(row["it"], type=Comment) for row in rows)}
    places: dict[str, list[Comment]] = {}  # of each: itself under all that it replies to, directly or not
    for comment in found.values():
        above = places.get(comment.parent_id or "", [])[:MAX_DEPTH]
        if above:
            above[-1].replies.append(comment)
        places[comment.id] = [*above, comment]
    return [comment for comment in found.values() if comment.parent_id not in found]


def on_project(conn: db.Connection, writer: Writer, project_id: str, author: str, content: str) -> ProjectComment:
    """Adds one. The project must be there."""
    return _add(conn, writer, ProjectComment, "project", project_id, project_id, author, content)


def _add(
    conn: db.Connection,
    writer: Writer,
    kind: type[E],
    entity_type: str,
    entity_id: str,
    project_id: str,
    author: str,
    content: str,
    parent_id: str | None = None,
) -> E:
    given = {
        "entity_type": entity_type,
        "entity_id": entity_id,
        "project_id": project_id,
        "parent_id": parent_id,
        "author_id": author,
        "author_username": author,
        "content": content,
    }
    return change(conn, writer, kind, str(uuid.uuid4()), "create", given)
