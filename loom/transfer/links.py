"""Dependencies and parents: said by either end, in any order, and without the cycles that Loom refuses."""

from __future__ import annotations

from collections.abc import Sequence

from loom.bounds import bounds
from loom.transfer.cycles import closing_edges
from loom.transfer.kinds import BEAD, Kind
from loom.transfer.report import Report
from loom.transfer.stage import Stage

SHOWN = 12  # beads of a cycle that a note names

# By which key of its source the bead `said_by` names the other one.
_SAID = """
    CASE WHEN inverse THEN other ELSE bead END AS said_by, CASE WHEN inverse THEN bead ELSE other END AS named,
    CASE how WHEN 'parent' THEN CASE WHEN inverse THEN 'children' ELSE 'parent' END
             ELSE CASE WHEN inverse THEN 'blocks' ELSE 'blocked_by' END END AS said_as
"""


def settle(stage: Stage, report: Report, with_existing: bool) -> None:
    """Fills `blocked_by` and `parent` of the staged beads. What cannot be carried stays in their attributes."""
    cur = stage.cur
    cur.execute("ALTER TABLE staged_links ADD COLUMN dropped text; ANALYZE staged_links")
    cur.execute("SELECT count(*) FROM staged_links")
    if cur.fetchone() == (0,):
        return
    # The row that says it was left out itself: then nobody says it.
    cur.execute(
        """
        DELETE FROM staged_links l WHERE NOT EXISTS (
            SELECT 1 FROM staged_beads b WHERE b.id = CASE WHEN l.inverse THEN l.other ELSE l.bead END);
        DELETE FROM staged_links l USING staged_links e
         WHERE (e.bead, e.other, e.how, e.inverse) = (l.bead, l.other, l.how, l.inverse) AND e.n < l.n
        """
    )
    if cur.rowcount:
        report.mapped["beads", "blocked_by", "named twice → once"] += cur.rowcount
    _drop(stage, "NOT EXISTS (SELECT 1 FROM staged_beads b WHERE b.id = l.bead) AND l.inverse",
          "'that bead is not in this import'")  # fmt: skip
    _drop(
        stage,
        """
        NOT EXISTS (SELECT 1 FROM staged_beads b WHERE b.id = l.other)
            AND NOT EXISTS (SELECT 1 FROM beads b WHERE b.id = l.other)
        """,
        "'there is no such bead'",
    )
    _drop(
        stage,
        """
        how = 'parent' AND n <> (SELECT n FROM staged_links e WHERE e.bead = l.bead AND e.how = 'parent'
                                    AND e.dropped IS NULL ORDER BY e.inverse, e.n LIMIT 1)
            AND other <> (SELECT other FROM staged_links e WHERE e.bead = l.bead AND e.how = 'parent'
                             AND e.dropped IS NULL ORDER BY e.inverse, e.n LIMIT 1)
        """,
        "'the bead has another parent'",
    )
    _without_cycles(stage, with_existing)
    _within_bounds(stage)
    _keep_dropped(stage, report)
    cur.execute(
        """
        UPDATE staged_beads b SET blocked_by = l.blockers FROM (
            SELECT bead, array_agg(other ORDER BY first) AS blockers FROM (
                SELECT bead, other, min(n) AS first FROM staged_links
                 WHERE how = 'blocked_by' AND dropped IS NULL GROUP BY 1, 2) AS once GROUP BY 1) AS l
         WHERE l.bead = b.id;
        UPDATE staged_beads b SET parent = l.other FROM staged_links l
         WHERE l.bead = b.id AND l.how = 'parent' AND l.dropped IS NULL
        """
    )


def _drop(stage: Stage, where: str, reason: str) -> None:
    stage.cur.execute(f"UPDATE staged_links l SET dropped = {reason} WHERE dropped IS NULL AND {where}")


def _without_cycles(stage: Stage, with_existing: bool) -> None:
    """Drops one link of each cycle. A bead waits for its blockers, and a parent for its children."""
    existing = """
        UNION SELECT k.blocker_id, k.bead_id, 'blocked_by' FROM bead_blockers k
         WHERE NOT EXISTS (SELECT 1 FROM staged_beads s WHERE s.id = k.bead_id)
        UNION SELECT b.id, b.parent, 'parent' FROM beads b
         WHERE b.parent IS NOT NULL AND NOT EXISTS (SELECT 1 FROM staged_beads s WHERE s.id = b.id)
        """
    stage.cur.execute(
        f"""
        CREATE TEMPORARY TABLE waits AS
            SELECT CASE how WHEN 'parent' THEN other ELSE bead END AS bead,
                   CASE how WHEN 'parent' THEN bead ELSE other END AS other
              FROM (SELECT other, bead, how FROM staged_links WHERE dropped IS NULL
                    {existing if with_existing else ""}) AS l
        """
    )
    for cycle in _cycles(stage, "SELECT bead, other FROM waits"):
        around = [*cycle, cycle[0]]
        names = around if len(around) <= SHOWN else [*around[: SHOWN - 2], "…", *around[-2:]]
        stage.cur.execute(
            """
            UPDATE staged_links SET dropped = 'would close the cycle ' || %(cycle)s
             WHERE dropped IS NULL AND ((how = 'blocked_by' AND (bead, other) = (%(last)s, %(first)s))
                                     OR (how = 'parent' AND (other, bead) = (%(last)s, %(first)s)))
            """,
            {"cycle": " → ".join(names), "last": cycle[-1], "first": cycle[0]},
        )


def _cycles(stage: Stage, edges: str) -> Sequence[list[str]]:
    """The cycles that must be opened among these pairs of ids, in the order of the ids."""
    stage.cur.execute(
        f"""
        DROP TABLE IF EXISTS edges, nodes;
        CREATE TEMPORARY TABLE edges AS SELECT DISTINCT bead COLLATE "C" AS bead, other COLLATE "C" AS other
          FROM ({edges}) AS e (bead, other);
        CREATE TEMPORARY TABLE nodes AS SELECT id, row_number() OVER (ORDER BY id) - 1 AS node
          FROM (SELECT bead AS id FROM edges UNION SELECT other FROM edges) AS ids;
        CREATE UNIQUE INDEX ON nodes (node);
        ANALYZE nodes
        """
    )
    stage.cur.execute("SELECT count(*) FROM nodes")
    (count,) = stage.cur.fetchone() or (0,)
    pairs = stage.each(
        "SELECT b.node, o.node FROM edges e JOIN nodes b ON b.id = e.bead JOIN nodes o ON o.id = e.other ORDER BY 1, 2"
    )
    found = list(closing_edges(pairs, count))
    named = []
    for cycle in found:
        stage.cur.execute("SELECT node, id FROM nodes WHERE node = ANY (%s)", (cycle,))
        names = dict(stage.cur.fetchall())
        named.append([names[node] for node in cycle])
    return named


def _within_bounds(stage: Stage) -> None:
    for column, bound, what in (
        ("bead", bounds.references, "'the bead would wait for more than {} others'"),
        ("other", bounds.dependants, "'more than {} beads would wait for that one'"),
    ):
        stage.cur.execute(
            f"""
            UPDATE staged_links l SET dropped = {what.format(bound)} FROM (
                SELECT n, count(*) OVER (PARTITION BY {column}, how ORDER BY n) AS nth FROM staged_links
                 WHERE dropped IS NULL) AS e
             WHERE e.n = l.n AND e.nth > {bound} AND how = 'blocked_by'
            """
        )


def _keep_dropped(stage: Stage, report: Report) -> None:
    for origin, column, named, reason in stage.each(
        f"SELECT origin, said_as, named, dropped FROM (SELECT *, {_SAID} FROM staged_links) AS l"
        " WHERE dropped IS NOT NULL ORDER BY n"
    ):
        report.note("beads", origin, column, reason, named)
    stage.cur.execute(
        f"""
        UPDATE staged_beads b SET kept = COALESCE(kept, '{{}}') || d.links FROM (
            SELECT said_by, jsonb_object_agg(said_as, names) AS links FROM (
                SELECT said_by, said_as, jsonb_agg(named ORDER BY n) AS names
                  FROM (SELECT *, {_SAID} FROM staged_links WHERE dropped IS NOT NULL) AS l GROUP BY 1, 2) AS each
             GROUP BY 1) AS d WHERE d.said_by = b.id
        """
    )


def without_loops(stage: Stage, kind: Kind) -> None:
    """Opens the loops among the parents of rows that are no beads."""
    assert kind is not BEAD
    parent = kind.parent
    edges = f"SELECT id, {parent} FROM {kind.staged} s WHERE {parent} IN (SELECT id FROM {kind.staged})"
    for loop in _cycles(stage, edges):
        row = loop[-1].replace("'", "''")
        stage.unset(kind, str(parent), f"s.id = '{row}'", f"would close the loop {' → '.join(loop[:SHOWN])}")
