"""The work graph: beads and what lies between them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec

from loom import db
from loom.bounds import bounds
from loom.db import Time
from loom.state.beads import Bead


class Edge(msgspec.Struct, rename={"source": "from", "target": "to"}):
    """relationship: 'blocks' (from what is waited for), 'parent' (to the child), or 'related'."""

    source: str
    target: str
    relationship: str


class WorkGraph(msgspec.Struct):
    """Beads by id. Each edge is told with the bead that names the other, which may be none of these."""

    beads: dict[str, Bead]
    edges: list[Edge]
    updated_at: Time


def now(conn: db.Connection) -> datetime:
    """When a graph is begun to be read, by the database's clock: what was written before is in it."""
    return db.value(conn, "SELECT clock_timestamp()")


def graph(page: db.Page[Bead], updated_at: datetime) -> tuple[WorkGraph, str | None]:
    """The graph of a page of beads; and the last of these if more follow, since the edges of a page need room, too."""
    beads: dict[str, Any] = {}  # as JSON: decoded, they would take many times the memory
    edges, last, size = bytearray(b"["), None, 0
    for bead in page:
        beads[bead.id], last = msgspec.Raw(msgspec.json.encode(bead)), bead.id
        size += len(beads[bead.id])
        for edge in _edges(bead):
            edges += b"," * (len(edges) > 1) + msgspec.json.encode(edge)
        if size + len(edges) > bounds.page_bytes:
            break
    every: Any = msgspec.Raw(edges + b"]")
    return WorkGraph(beads, every, updated_at), last if page.more else None


def _edges(bead: Bead) -> Iterator[Edge]:
    for blocker in bead.blocked_by:
        yield Edge(blocker, bead.id, "blocks")
    if bead.parent is not None:
        yield Edge(bead.parent, bead.id, "parent")
    for other in bead.related_to:
        yield Edge(bead.id, other, "related")
