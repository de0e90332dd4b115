"""Decides on the stage's rows when all have been read: which can be carried, and where each reference leads."""

from __future__ import annotations

from typing import Literal

import psycopg2

from loom import errors
from loom.bounds import bounds
from loom.config import SETTINGS, SHAREABLE
from loom.transfer import links
from loom.transfer.kinds import AGENT, BEAD, COMMENT, CONFIG, KINDS, PROJECT, REQUEST_LOG, Kind
from loom.transfer.report import Report
from loom.transfer.stage import LARGE, Row, Stage, attributes

Conflict = Literal["fail", "skip", "replace"]
SHOWN = 5  # conflicts that an error names


def settle(
    stage: Stage, report: Report, on_conflict: Conflict, default_project: str, log_days: int, resume: bool
) -> None:
    """Prepares the stage for the writer. Raises Conflict for rows that are there already and differ.

    resume: whether rows may have been written by an earlier run of the same import.
    """
    for kind in KINDS:
        stage.cur.execute(f"CREATE INDEX ON {kind.staged} (level, n); ANALYZE {kind.staged}")
        _without_duplicates(stage, kind)
        _without_large(stage, kind)
    _config(stage)
    _request_logs(stage, log_days)
    _projects_of_beads(stage, report, default_project)
    _references(stage)
    _assignees(stage, report)
    links.settle(stage, report, with_existing=on_conflict == "replace")
    _comments(stage)
    for kind in (PROJECT, COMMENT):
        links.without_loops(stage, kind)
    for kind in KINDS:
        if kind.parent:
            _levels(stage, kind)
        _fates(stage, kind, on_conflict)
        if resume:
            _written_before(stage, kind, report.source)
    stage.cur.execute("DELETE FROM staged_links WHERE dropped IS NOT NULL; ANALYZE staged_beads")
    if on_conflict == "fail":
        _refuse_conflicts(stage)


def _without_duplicates(stage: Stage, kind: Kind) -> None:
    """The first row of an id stays."""
    unique = f"CREATE UNIQUE INDEX ON {kind.staged} ({kind.key})"
    stage.cur.execute("SAVEPOINT once")
    try:
        stage.cur.execute(unique)
    except psycopg2.IntegrityError:
        stage.cur.execute("ROLLBACK TO SAVEPOINT once")
        later = f"(SELECT ctid FROM (SELECT ctid, row_number() OVER (PARTITION BY {kind.key} ORDER BY n)" + (
            f" FROM {kind.staged}) AS numbered (ctid, nth) WHERE nth > 1)"
        )
        stage.leave_out(kind, f"s.ctid IN {later}", f"'another row has the same {kind.key}, ' || s.{kind.key}")
        stage.cur.execute(unique)


def _without_large(stage: Stage, kind: Kind) -> None:
    columns = ", ".join(f"{attributes(kind)} AS attributes" if c == "attributes" else f"s.{c}" for c in kind.columns)
    size = f"(SELECT octet_length(to_jsonb(whole)::text) FROM (SELECT {columns}) AS whole)"
    stage.leave_out(
        kind,
        f"s.characters > {LARGE} AND {size} > {bounds.entity}",
        f"'would have ' || {size} || ' bytes, and may have {bounds.entity}'",
    )


def _config(stage: Stage) -> None:
    own = "', '".join(sorted(SETTINGS - SHAREABLE))
    stage.leave_out(CONFIG, f"s.key IN ('{own}')", "'is a setting that each instance of Loom has for itself'")
    size = "octet_length(s.value::text)"
    stage.leave_out(CONFIG, f"{size} > {bounds.shared_value}", f"'has more than {bounds.shared_value} bytes'")
    stage.leave_out(
        CONFIG,
        f"""s.ctid IN (SELECT new.ctid FROM (
            SELECT n.ctid, count(*) OVER w AS keys, sum(octet_length(n.value::text)) OVER w AS bytes
              FROM staged_config n WHERE NOT EXISTS (SELECT 1 FROM config c WHERE c.key = n.key)
            WINDOW w AS (ORDER BY n.n)) AS new, (SELECT count(*) AS keys, COALESCE(sum(octet_length(value::text)), 0)
              AS bytes FROM config) AS there
            WHERE new.keys + there.keys > {bounds.shared_keys} OR new.bytes + there.bytes > {bounds.shared_values})""",
        f"'no room: all keys together are at most {bounds.shared_keys}, their values {bounds.shared_values} bytes'",
    )


def _request_logs(stage: Stage, days: int) -> None:
    """Only those that upkeep would not remove at once."""
    stage.leave_out(REQUEST_LOG, "s.timestamp IS NULL", "'has no time'")
    # A day less: the oldest partition may be removed while the import runs.
    old = f"s.timestamp < clock_timestamp() - INTERVAL '{days - 1} days'"
    stage.leave_out(REQUEST_LOG, old, f"'is older than logging.retention_days ({days}) allows'")
    stage.leave_out(REQUEST_LOG, "s.timestamp > clock_timestamp() + INTERVAL '1 day'", "'is of a time to come'")


def _projects_of_beads(stage: Stage, report: Report, default: str) -> None:
    """Each bead needs a project: one that nobody describes is made, named by its id, and as old as its oldest bead."""
    stage.cur.execute("UPDATE staged_beads SET project_id = %s WHERE project_id IS NULL", (default,))
    if stage.cur.rowcount:
        report.mapped["beads", "project_id", f"empty → {default}"] += stage.cur.rowcount
    stage.cur.execute(
        """
        SELECT project_id, min(created_at)::text FROM staged_beads s
         WHERE NOT EXISTS (SELECT 1 FROM projects WHERE id = s.project_id)
           AND NOT EXISTS (SELECT 1 FROM staged_projects p WHERE p.id = s.project_id)
         GROUP BY 1 ORDER BY 1
        """
    )
    new = stage.cur.fetchall()
    given: dict[str, str | None] = {
        "bead_prefix": "bd",
        "is_perpetual": "f",
        "is_sticky": "f",
        "git_strategy": "direct",
        "status": "open",
    }
    given |= {"context": "{}", "attributes": "{}", "parent_id": None, "due_date": None, "closed_at": None}
    rows = []
    for n, (project, at) in enumerate(new):
        report.note("projects", project, "", "is made, since beads name it")
        report.of("projects").read += 1
        values = {**given, "id": project, "name": project, "created_at": at, "updated_at": at}
        rows.append(Row(PROJECT, n - len(new), project, [values.get(column, "") for column in PROJECT.columns]))
    stage.fill(iter(rows))


def _there(table: str, column: str) -> str:
    """Whether a reference leads to a row that is there or comes, in SQL."""
    return (
        f"(EXISTS (SELECT 1 FROM staged_{table} x WHERE x.id = s.{column})"
        f" OR EXISTS (SELECT 1 FROM {table} y WHERE y.id = s.{column}))"
    )


def _references(stage: Stage) -> None:
    for kind, column, table in (
        (PROJECT, "parent_id", "projects"),
        (AGENT, "provider_id", "providers"),
        (AGENT, "project_id", "projects"),
    ):
        stage.unset(kind, column, f"NOT {_there(table, column)}", f"there is no such row in {table}")


def _assignees(stage: Stage, report: Report) -> None:
    """An assignee is an agent, or a role that one agent has. Without it, nobody works on a bead in progress."""
    stage.cur.execute(
        f"""
        CREATE TEMPORARY TABLE roles AS
            SELECT role, min(id) AS agent FROM (
                SELECT role, id FROM staged_agents UNION SELECT role, id FROM agents) AS a
             WHERE role <> '' GROUP BY role HAVING count(*) = 1;
        UPDATE staged_beads s SET assigned_to = roles.agent,
               kept = COALESCE(kept, '{{}}') || jsonb_build_object('assigned_to', s.assigned_to)
          FROM roles WHERE roles.role = s.assigned_to AND NOT {_there("agents", "assigned_to")}
        """
    )
    if stage.cur.rowcount:
        report.mapped["beads", "assigned_to", "role → the agent that has it"] += stage.cur.rowcount
    stage.unset(BEAD, "assigned_to", f"NOT {_there('agents', 'assigned_to')}", "there is no such agent")
    stage.cur.execute(
        """
        UPDATE staged_beads SET status = 'open',
               kept = jsonb_build_object('status', 'in_progress') || kept
         WHERE status = 'in_progress' AND assigned_to IS NULL AND kept ? 'assigned_to'
        """
    )
    if stage.cur.rowcount:
        report.mapped["beads", "status", "in_progress, by an agent that is not there → open"] += stage.cur.rowcount


def _comments(stage: Stage) -> None:
    stage.leave_out(COMMENT, f"NOT {_there('beads', 'entity_id')}", "'there is no bead ' || s.entity_id")
    same = "x.id = s.parent_id AND x.entity_id = s.entity_id AND x.entity_type = 'bead'"
    stage.unset(
        COMMENT,
        "parent_id",
        f"NOT EXISTS (SELECT 1 FROM staged_comments x WHERE {same})"
        f" AND NOT EXISTS (SELECT 1 FROM comments x WHERE {same})",
        "there is no such comment on this bead",
    )


def _levels(stage: Stage, kind: Kind) -> None:
    """A row is written after its parent."""
    stage.cur.execute(f"SELECT 1 FROM {kind.staged} WHERE {kind.parent} IS NOT NULL LIMIT 1")
    if not stage.cur.fetchone():
        return
    stage.cur.execute(
        f"""
        CREATE INDEX ON {kind.staged} ({kind.parent}) WHERE {kind.parent} IS NOT NULL;
        WITH RECURSIVE below (id, level) AS (
            SELECT c.id, 1 FROM {kind.staged} c JOIN {kind.staged} p ON p.id = c.{kind.parent}
             WHERE p.{kind.parent} IS NULL OR NOT EXISTS (SELECT 1 FROM {kind.staged} g WHERE g.id = p.{kind.parent})
            UNION ALL SELECT c.id, below.level + 1 FROM below JOIN {kind.staged} c ON c.{kind.parent} = below.id)
        UPDATE {kind.staged} s SET level = below.level FROM below WHERE below.id = s.id
        """
    )


def _fates(stage: Stage, kind: Kind, on_conflict: Conflict) -> None:
    """What becomes of each row: 'new', 'same', or, if a different row is there: 'conflict', 'skip' or 'replace'."""
    different = {"fail": "'conflict'", "skip": "'skip'", "replace": "'replace'"}[on_conflict]
    if on_conflict == "replace" and not kind.versioned:
        different = "'skip'"
    if kind is BEAD and on_conflict == "replace":
        different = "CASE WHEN t.fencing_token IS NULL THEN 'replace' ELSE 'claimed' END"
    ours = ", ".join(attributes(kind) if c == "attributes" else f"s.{c}" for c in kind.columns)
    theirs = ", ".join(f"t.{c}" for c in kind.columns)
    stage.cur.execute(
        f"UPDATE {kind.staged} s SET fate = CASE WHEN ROW({ours}) IS NOT DISTINCT FROM ROW({theirs}) THEN 'same'"
        f" ELSE {different} END FROM {kind.table} t WHERE t.{kind.key} = s.{kind.key}"
    )


def _written_before(stage: Stage, kind: Kind, source: str) -> None:
    """Those that an earlier run has written, also if others have changed or deleted them since."""
    stage.cur.execute(
        f"""
        UPDATE {kind.staged} s SET fate = 'before' FROM imports i
         WHERE (i.source, i.kind) = (%s, '{kind.name}') AND (s.level, s.n) <= (i.level, i.n)
           AND (EXISTS (SELECT 1 FROM {kind.table} t WHERE t.{kind.key} = s.{kind.key})
                OR EXISTS (SELECT 1 FROM events e
                            WHERE e.entity_type = '{kind.name}' AND e.entity_id = s.{kind.key}::text))
        """,
        (source,),
    )


def _refuse_conflicts(stage: Stage) -> None:
    found, first = 0, []
    for kind in KINDS:
        stage.cur.execute(
            f"SELECT {kind.key}, count(*) OVER () FROM {kind.staged} WHERE fate = 'conflict' ORDER BY 1 LIMIT {SHOWN}"
        )
        rows = stage.cur.fetchall()
        found += rows[0][1] if rows else 0
        first += [f"{kind.name} {key}" for key, _ in rows]
    if found:
        raise errors.Conflict(
            f"{found} rows are there already, and differ: {', '.join(first[:SHOWN])}{', …' if found > SHOWN else ''}."
            " Nothing is written. Choose --on-conflict skip or replace."
        )
