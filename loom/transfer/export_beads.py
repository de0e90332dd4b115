"""Writes beads as `bd` has them, issues.jsonl: with every field that an import has kept for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import cursor as Cursor

from loom import db
from loom.db.connection import translate
from loom.transfer.bd import KEPT as BD
from loom.transfer.bead_form import STATUSES
from loom.transfer.errors import SourceError
from loom.transfer.importing import CONNECT_SECONDS
from loom.transfer.kinds import KEPT

# Loom's columns that bd has under another name. What is empty is left out, as bd does.
NAMES = {"type": "issue_type", "assigned_to": "assignee", "tags": "labels", "estimated_time": "estimated_minutes"}
COLUMNS = (
    *("id", "title", "description", "status", "priority", "type", "assigned_to", "tags", "estimated_time"),
    *("created_at", "updated_at", "closed_at", "close_reason"),
)
ALWAYS = ("id", "title", "status", "priority", "issue_type", "created_at", "updated_at")


def export_beads(dsn: str, file: Path, project: str | None) -> int:
    """Writes the beads of a project, or all; returns how many. Raises Unavailable, SourceError."""
    partial = file.with_name(file.name + ".partial")
    try:
        conn = db.Connection(dsn, "loom export-beads", CONNECT_SECONDS)
    except psycopg2.Error as exc:
        raise translate(exc) from exc
    try:
        conn.raw.autocommit = False
        with conn.raw.cursor(name="beads") as cur, partial.open("w", encoding="utf-8") as out:
            count = 0
            for issue in _issues(cur, project):
                out.write(json.dumps(issue, ensure_ascii=False, separators=(",", ":")) + "\n")
                count += 1
        partial.replace(file)
        return count
    except psycopg2.Error as exc:
        raise translate(exc) from exc
    except OSError as exc:
        raise SourceError(f"{file}: cannot be written: {exc.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
        conn.close()


def _issues(cur: Cursor, project: str | None) -> Iterator[dict[str, Any]]:
    cur.itersize = 500
    cur.execute(
        """
        SELECT row_to_json(b)::text, (
            SELECT json_agg(json_build_object('id', c.id, 'issue_id', b.id, 'author', c.author_id, 'text', c.content,
                                              'created_at', c.created_at) ORDER BY c.created_at, c.id)::text
              FROM comments c WHERE c.entity_type = 'bead' AND c.entity_id = b.id)
          FROM beads b WHERE project_id = %(project)s OR %(project)s IS NULL ORDER BY id
        """,
        {"project": project},
    )
    for bead, comments in cur:
        yield _issue(json.loads(bead), json.loads(comments) if comments else [])


def _issue(bead: dict[str, Any], comments: list[dict[str, Any]]) -> dict[str, Any]:
    attributes = bead["attributes"]
    kept, own = attributes.get(KEPT, {}), attributes.get(BD, {})
    issue: dict[str, Any] = {}
    for column in COLUMNS:
        name = NAMES.get(column, column)
        value = bead[column]
        if column == "status":
            value = _status(bead["status"], kept)
        elif column == "assigned_to" and not value:
            value = kept.get("assigned_to")
        elif column.endswith("_at"):
            value = _time(value)
        if value not in (None, "", []) or name in ALWAYS:
            issue[name] = value
    issue |= {name: value for name, value in own.items() if name != "dependencies"}
    if dependencies := _dependencies(bead, own.get("dependencies") or [], kept):
        issue["dependencies"] = dependencies
    if comments:
        issue["comments"] = [_comment(comment, bead["id"]) for comment in comments]
    return issue


def _status(status: str, kept: dict[str, Any]) -> str:
    """The status that was imported, unless the bead has another one since."""
    given = kept.get("status")
    if given is None:
        return status
    became = "open" if given == "in_progress" else STATUSES[1].get(given, STATUSES[2])
    return given if status == became else status


def _dependencies(bead: dict[str, Any], given: list[Any], kept: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that hold now: as they were imported, if they were; then the new ones."""
    now = {("blocks", other) for other in bead["blocked_by"]}
    now |= {("parent-child", bead["parent"])} if bead["parent"] else set()
    dropped = {("blocks", other) for other in kept.get("blocked_by", ())}
    dropped |= {("parent-child", other) for other in kept.get("parent", ())}
    found, seen = [], set()
    for dependency in given:
        link = (dependency.get("type", "blocks"), dependency.get("depends_on_id"))
        if link[0] not in ("blocks", "parent-child") or link in now | dropped:
            found.append(dependency)
            seen.add(link)
    for how, other in sorted(now - seen):
        found.append({"issue_id": bead["id"], "depends_on_id": other, "type": how})
    return found


def _comment(comment: dict[str, Any], bead: str) -> dict[str, Any]:
    number = comment["id"].removeprefix(f"{bead}:")
    return {
        **comment,
        "id": int(number) if number.isdigit() else comment["id"],
        "created_at": _time(comment["created_at"]),
    }


def _time(value: str | None) -> str | None:
    """As Go writes it in UTC."""
    return value and value.replace("+00:00", "Z")
