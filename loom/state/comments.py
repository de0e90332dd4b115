"""Remarks on beads and projects, which change neither."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

from loom import db
from loom.db import Time
from loom.state.beads import Bead
from loom.state.entities import E, Versioned, change, get
from loom.state.writer import Writer

MAX_DEPTH = 50  # of replies to replies as they are answered; deeper ones stand side by side


class Place(NamedTuple):
    """Where a comment stands in a list."""

    created_at: str
    id: str


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
    return _add(
        conn,
        writer,
        Comment,
        "bead",
        bead.id,
        bead.project_id,
        writer.actor or (writer.principal if writer.restricted else None) or "",
        content,
        parent_id,
    )


def some(conn: db.Connection, kind: type[E], entity_id: str, *, after: Place | None, limit: int) -> db.Page[E]:
    """Those on one bead or project, oldest first; those behind `after` only."""
    sql = f"""
        SELECT as_json(c)::text FROM comments c WHERE entity_type = %(on)s AND entity_id = %(id)s
            {"AND (created_at, id) > (%(created_at)s::timestamptz, %(after)s)" if after else ""}
         ORDER BY created_at, id LIMIT %(most_rows)s + 1
        """
    on = "bead" if issubclass(kind, Comment) else "project"
    where = {"created_at": after.created_at, "after": after.id} if after else {}
    return db.Page(conn, kind, sql, limit, on=on, id=entity_id, **where)


def place_of(comment: Comment | ProjectComment) -> Place:
    return Place(comment.created_at.isoformat(), comment.id)


def threads(comments: Iterable[Comment]) -> list[Comment]:
    """Comments with those that reply to them inside; one whose parent is not among them stands by itself."""
    found = {comment.id: comment for comment in comments}
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
