"""The issues.jsonl of `bd`: one JSON object a line, read and written so that no field is lost on the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loom.transfer import values
from loom.transfer.bead_form import FORM
from loom.transfer.build import Builders, Form
from loom.transfer.errors import SourceError
from loom.transfer.kinds import COMMENT
from loom.transfer.report import Report
from loom.transfer.stage import Link, Row
from loom.transfer.values import Bad, key, loads, moment, text

KEPT = "bd"  # the key in `attributes` of what only bd has
MAX_LINE = 16 * 2**20


def read(file: Path, report: Report, count: int) -> Iterator[Row | Link]:
    """The beads of the file, with their comments. count: how many beads came before."""
    file_time = values.moment_of_file(file)
    beads, comments = Builders(FORM, report, file_time), Builders(_COMMENTS, report, file_time)
    number = 0
    for line, raw in _lines(file):
        origin = f"{file.name}:{line}"
        try:
            issue = _issue(raw)
        except Bad as bad:
            report.of("beads").read += 1
            report.leave_out("beads", origin, bad.reason)
            continue
        record = {_RENAMED.get(name, name): value for name, value in issue.items() if name in _OWN}
        more = {name: value for name, value in issue.items() if name not in _OWN and name != "comments"}
        row = beads.build(count + line, origin, record, {KEPT: more} if more else {})
        if row is None:
            continue
        yield row
        bead = str(row.values[0])
        yield from _links(bead, origin, issue.get("dependencies"), report)
        for comment in issue.get("comments") or ():
            number += 1
            if isinstance(comment, dict):
                named = {**comment, "id": f"{bead}:{comment.get('id', number)}", "issue_id": bead}
                found = comments.build(number, f"{origin} comment {number}", named, {})
                if found is not None:
                    yield found


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as lines:
            for number in itertools.count(1):
                raw = lines.readline(MAX_LINE)
                if not raw:
                    return
                rest = raw
                while not rest.endswith(b"\n") and (rest := lines.readline(MAX_LINE)):
                    raw = raw[:MAX_LINE] + b"\0"  # longer than any bead: refused as JSON
                if raw.strip():
                    yield number, raw
    except OSError as exc:
        raise SourceError(f"{file}: cannot be read: {exc.strerror}") from None


def _issue(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE:
        raise Bad(f"has more than {MAX_LINE} bytes")
    try:
        issue = loads(raw.decode())
    except UnicodeDecodeError:
        raise Bad("is not UTF-8") from None
    if not isinstance(issue, dict):
        raise Bad("is not a JSON object")
    return issue


def _links(bead: str, origin: str, dependencies: Any, report: Report) -> Iterator[Link]:
    """Those that Loom has links for; the others stay in the attributes."""
    for dependency in dependencies if isinstance(dependencies, list) else ():
        try:
            how = _HOW.get(dependency.get("type", "blocks"))
            if how is not None and dependency.get("issue_id", bead) == bead:
                yield Link(bead, key(dependency.get("depends_on_id")), how, False, origin)
        except (AttributeError, TypeError):
            report.note("beads", origin, "dependencies", "is not an object", dependency)
        except Bad as bad:
            report.note("beads", origin, "dependencies", bad.reason, dependency.get("depends_on_id"))


_HOW = {"blocks": "blocked_by", "parent-child": "parent"}
_RENAMED = {"issue_type": "type", "assignee": "assigned_to", "labels": "tags", "estimated_minutes": "estimated_time"}
_OWN = frozenset(
    {"id", "title", "description", "status", "priority", "created_at", "updated_at", "closed_at", "close_reason"}
    | _RENAMED.keys()
)
_COMMENTS = Form(
    COMMENT,
    {
        "id": ("id", key),
        "issue_id": ("entity_id", key),
        "author": ("author_id", text),
        "text": ("content", text),
        "created_at": ("created_at", moment),
        "updated_at": ("updated_at", moment),
    },
    {"entity_type": "bead", "author_id": "", "author_username": "", "content": ""},
)
