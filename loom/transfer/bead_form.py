"""Beads, as all their sources have them: fields, words, and links that either end may say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from loom.transfer.build import Form
from loom.transfer.kinds import BEAD
from loom.transfer.report import Report
from loom.transfer.stage import Link
from loom.transfer.values import Bad, array, integer, json_object, key, loads, moment, reference, text

STATUSES = (
    ("open", "in_progress", "blocked", "deferred", "closed"),
    {"cancelled": "closed", "tombstone": "closed", "pinned": "deferred", "hooked": "in_progress"},
    "deferred",
)
LISTS = {"blocked_by": ("blocked_by", False), "blocks": ("blocked_by", True), "children": ("parent", True)}


def priority(value: Any) -> str | None:
    found = integer(value)
    if found is not None and not 0 <= int(found) <= 4:
        raise Bad("is not from 0 to 4", "0" if int(found) < 0 else "4")
    return found


def kind_of_bead(value: Any) -> str | None:
    found = text(value)
    if found and len(found) > 64:
        raise Bad("has more than 64 characters", "task")
    return found or None


FIELDS = {
    "id": ("id", key),
    "type": ("type", kind_of_bead),
    "title": ("title", text),
    "description": ("description", text),
    "status": ("status", text),
    "priority": ("priority", priority),
    "project_id": ("project_id", reference),
    "assigned_to": ("assigned_to", reference),
    "related_to": ("related_to", array),
    "tags": ("tags", array),
    "context": ("context", json_object),
    "due_date": ("due_date", moment),
    "milestone_id": ("milestone_id", reference),
    "estimated_time": ("estimated_time", integer),
    "close_reason": ("close_reason", text),
    "closed_at": ("closed_at", moment),
    "created_at": ("created_at", moment),
    "updated_at": ("updated_at", moment),
}
DEFAULTS = {
    **{"type": "task", "title": "", "description": "", "status": "open", "priority": "2", "blocked_by": "{}"},
    **{"related_to": "{}", "tags": "{}", "context": "{}", "attributes": "{}"},
}
FORM = Form(BEAD, {**FIELDS, "attributes": ("attributes", json_object)}, DEFAULTS, {"status": STATUSES})


def links_of(bead: str, origin: str, links: Mapping[str, Any], report: Report) -> Iterator[Link]:
    """What a bead says about others, from both ends."""
    for name, value in links.items():
        for other in [value] if name == "parent" else _listed(value):
            if other in (None, ""):
                continue
            try:
                named = key(other)
            except Bad as bad:
                report.note("beads", origin, name, bad.reason, other)
                continue
            how, inverse = LISTS.get(name, ("parent", False))
            yield Link(named if inverse else bead, bead if inverse else named, how, inverse, origin)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        with suppress(Bad):
            value = loads(value) if value.startswith("[") else value
    return value if isinstance(value, list) else [value]
