"""The work graph: beads and what lies between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec

from loom import db
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


def graph(beads: Sequence[Bead], updated_at: datetime) -> WorkGraph:
    return WorkGraph({bead.id: bead for bead in beads}, [edge for bead in beads for edge in _edges(bead)], updated_at)


def _edges(bead: Bead) -> Iterator[Edge]:
    for blocker in bead.blocked_by:
        yield Edge(blocker, bead.id, "blocks")
    if bead.parent is not None:
        yield Edge(bead.parent, bead.id, "parent")
    for other in bead.related_to:
        yield Edge(bead.id, other, "related")
