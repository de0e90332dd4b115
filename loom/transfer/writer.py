"""Writes the stage's rows into Loom's tables, with their events, counters and links: set by set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from psycopg2 import errors as pg
from psycopg2.extensions import cursor as Cursor

from loom import errors
from loom.transfer.kinds import BEAD, PROJECT, REQUEST_LOG, Kind
from loom.transfer.report import Report
from loom.transfer.stage import Stage, attributes

_NOBODY = "instance_id, request_id, proxy_request_id"  # given, since to work out their defaults takes time
IN_NO_EVENT = ("version", "open_claims", "open_blockers", "open_children")


class Batch(NamedTuple):
    """The rows of a kind that follow a place in the order of writing, up to another one."""

    kind: Kind
    after: tuple[int, int]
    last: tuple[int, int]
    rows: int


def batches(stage: Stage, kind: Kind, size: int) -> Iterator[Batch]:
    """In the order of writing."""
    after = (-1, -(2**63))
    while True:
        stage.cur.execute(
            f"""
            SELECT level, n, count(*) OVER () FROM (
                SELECT level, n FROM {kind.staged} WHERE (level, n) > (%s, %s) ORDER BY level, n LIMIT %s) AS b
             ORDER BY level DESC, n DESC LIMIT 1
            """,
            (*after, size),
        )
        row = stage.cur.fetchone()
        if row is None:
            return
        last = (row[0], row[1])
        yield Batch(kind, after, last, row[2])
        after = last


class Writer:
    """Writes batches. `among_others`: while instances serve, so with the names that their changes take."""

    def __init__(self, cur: Cursor, report: Report, among_others: bool) -> None:
        self._cur, self._report, self._among_others = cur, report, among_others
        self._source = report.source
        self._replacing: dict[str, bool] = {}
        self._columns: dict[str, list[tuple[str, bool]]] = {}

    def write(self, batch: Batch) -> None:
        """Raises Conflict when a row has appeared since the stage was settled, LockHeld for a name that is held."""
        kind = batch.kind
        where = f"(s.level, s.n) > ({batch.after[0]}, {batch.after[1]}) AND (s.level, s.n) <= {batch.last}"
        if self._among_others and kind.versioned:
            self._enter(kind, where)
        counts = self._report.of(kind.table)
        replaced = self._replace(kind, where) if self._replaces(kind) else 0
        try:
            written = self._insert(kind, where)
        except pg.UniqueViolation as exc:
            raise errors.Conflict(f"Others have made one of the same {kind.table} meanwhile. Run it again.") from exc
        self._cur.execute(f"SELECT fate, count(*) FROM {kind.staged} s WHERE {where} GROUP BY 1")
        fates = dict(self._cur.fetchall())
        counts.written += written
        counts.replaced += replaced
        counts.same += fates.get("same", 0)
        counts.before += fates.get("before", 0)
        counts.skipped += fates.get("skip", 0) + fates.get("claimed", 0)

    def _enter(self, kind: Kind, where: str) -> None:
        self._cur.execute(
            f"""
            SELECT enter_names(ARRAY(SELECT '{kind.name}:' || s.{kind.key} FROM {kind.staged} s
                                      WHERE {where} AND s.fate IN ('new', 'replace')), NULL)
            """
        )
        if kind is BEAD:
            self._cur.execute(
                f"""
                SELECT lock_bead_graph() WHERE EXISTS (SELECT 1 FROM staged_beads s
                    WHERE {where} AND s.fate IN ('new', 'replace') AND s.blocked_by <> '{{}}');
                SELECT 1 FROM beads WHERE id IN (
                    SELECT unnest(s.blocked_by || s.parent || s.id) FROM staged_beads s
                     WHERE {where} AND s.fate IN ('new', 'replace')) ORDER BY id FOR NO KEY UPDATE
                """
            )

    def _insert(self, kind: Kind, where: str) -> int:
        columns = list(kind.columns)
        values = [attributes(kind) if column == "attributes" else f"s.{column}" for column in columns]
        columns += kind.derived.keys()
        values += kind.derived.values()
        more = ""
        if kind is REQUEST_LOG:
            more = _USAGE
        if kind is BEAD:
            columns += ["open_blockers", "open_children"]
            values += [_OPEN_BLOCKERS, _OPEN_CHILDREN]
            more = _AFTER_BEADS
        self._cur.execute(
            f"""
            WITH written AS (
                INSERT INTO {kind.table} AS t ({", ".join(columns)})
                SELECT {", ".join(values)} FROM {kind.staged} s WHERE {where} AND s.fate = 'new'
                 ORDER BY s.level, s.n RETURNING t.*){more}
            {self._events(kind) if kind.versioned else "SELECT FROM written"}
            """,
            {"source": self._source},
        )
        return self._cur.rowcount

    def _events(self, kind: Kind) -> str:
        return f"""
            INSERT INTO events (type, entity_type, entity_id, version, project_id, timestamp, changes, actor, {_NOBODY})
            SELECT '{kind.name}.imported', '{kind.name}', {kind.key}, version, {_project(kind)}, clock_timestamp(),
                   {self._all_of(kind)} || jsonb_build_object('imported_from', %(source)s),
                   'loom import', NULL, NULL, NULL FROM written
            """

    def _all_of(self, kind: Kind) -> str:
        """The row as an event has it: without what is null, at the top level only."""
        if kind.table not in self._columns:
            self._cur.execute(
                "SELECT attname, attnotnull FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0"
                " AND NOT attisdropped ORDER BY attnum",
                (kind.table,),
            )
            self._columns[kind.table] = self._cur.fetchall()
        nullable = [
            f"CASE WHEN {column} IS NULL THEN '{column}' END"
            for column, not_null in self._columns[kind.table]
            if not not_null and column not in IN_NO_EVENT
        ]
        absent = "".join(f", '{column}'" for column, _ in self._columns[kind.table] if column in IN_NO_EVENT)
        return f"to_jsonb(written) - array_remove(ARRAY[{', '.join(nullable) or 'NULL'}{absent}], NULL)"

    def _replaces(self, kind: Kind) -> bool:
        if kind.table not in self._replacing:
            self._cur.execute(f"SELECT EXISTS (SELECT 1 FROM {kind.staged} WHERE fate = 'replace')")
            self._replacing[kind.table] = self._cur.fetchone() == (True,)
        return self._replacing[kind.table]

    def _replace(self, kind: Kind, where: str) -> int:
        """Each gets a new version, and an event of what is different."""
        given = [column for column in kind.columns if column != kind.key]
        values = [attributes(kind) if column == "attributes" else f"s.{column}" for column in given]
        self._cur.execute(
            f"""
            WITH was AS MATERIALIZED (
                SELECT t.{kind.key} AS was_key, to_jsonb(t) AS was
                  FROM {kind.table} t JOIN {kind.staged} s USING ({kind.key})
                 WHERE {where} AND s.fate = 'replace' ORDER BY 1 FOR NO KEY UPDATE OF t),
            written AS (
                UPDATE {kind.table} t SET ({", ".join(given)}, version) = ROW({", ".join(values)}, t.version + 1)
                  FROM {kind.staged} s JOIN was ON was_key = s.{kind.key} WHERE t.{kind.key} = s.{kind.key}
                RETURNING t.*)
            INSERT INTO events (type, entity_type, entity_id, version, project_id, timestamp, changes)
            SELECT '{kind.name}.imported', '{kind.name}', was_key, version, {_project(kind)}, clock_timestamp(),
                   (SELECT COALESCE(jsonb_object_agg(e.key, patch_between(was -> e.key, e.value)), '{{}}')
                      FROM jsonb_each(to_jsonb(written)) AS e
                     WHERE e.value IS DISTINCT FROM was -> e.key AND e.key <> ALL (%(silent)s))
                   || jsonb_build_object('imported_from', %(source)s)
              FROM written JOIN was ON was_key = written.{kind.key}
            """,
            {"source": self._source, "silent": list(IN_NO_EVENT)},
        )
        replaced = self._cur.rowcount
        if replaced and kind is BEAD:
            self._cur.execute(
                f"""
                UPDATE beads b SET open_blockers = c.open_blockers FROM (
                    SELECT s.id, {_OPEN_BLOCKERS} AS open_blockers FROM staged_beads s
                     WHERE {where} AND s.fate = 'replace') AS c
                 WHERE c.id = b.id AND c.open_blockers <> b.open_blockers
                """
            )
        return replaced

    def prepare(self) -> None:
        """Makes the partitions of the request logs."""
        self._cur.execute(
            """
            SELECT open_request_logs(clock_timestamp() - oldest, 0)
              FROM (SELECT min(timestamp) AS oldest FROM staged_request_logs) AS s WHERE oldest IS NOT NULL
            """
        )

    def finish(self) -> None:
        """The numbers of new ids go on behind those that were imported."""
        for kind, sequence in ((BEAD, "bead_numbers"), (PROJECT, "project_numbers")):
            # More than nine digits are a time or a hash.
            self._cur.execute(
                f"""
                SELECT setval('{sequence}', greatest) FROM (
                    SELECT max(substring(id FROM '-([0-9]{{1,9}})$')::bigint) AS greatest FROM {kind.staged}) AS g
                 WHERE greatest > (SELECT last_value FROM {sequence})
                """
            )


def _project(kind: Kind) -> str:
    return {"project": "id", "provider": "NULL", "config": "NULL"}.get(kind.name, "project_id")


# A blocker that comes in a later batch counts as it is staged; one that is there, as it is now.
_OPEN_BLOCKERS = """
    (SELECT count(*) FROM unnest(s.blocked_by) AS u (id) LEFT JOIN beads x ON x.id = u.id
       LEFT JOIN staged_beads y ON y.id = u.id WHERE COALESCE(x.status, y.status) <> 'closed')
"""
# Children come after their parent, which counts them before: it must not be ready in between.
_OPEN_CHILDREN = """
    (SELECT count(*) FROM staged_beads c WHERE c.parent = s.id AND c.fate = 'new' AND c.status <> 'closed')
"""
# The sums of each hour, as report_usage() in loom/state/logs.py adds to them.
_USAGE = """,
    sums AS (
        INSERT INTO model_usage AS u
        SELECT date_trunc('hour', timestamp, 'UTC'), provider_id, COALESCE(model_name, ''), COALESCE(user_id, ''), '',
               count(*), count(*) FILTER (WHERE status_code >= 400 OR error_message IS NOT NULL),
               COALESCE(sum(prompt_tokens), 0), COALESCE(sum(completion_tokens), 0), COALESCE(sum(cost_usd), 0),
               COALESCE(sum(latency_ms), 0)
          FROM written WHERE provider_id IS NOT NULL GROUP BY 1, 2, 3, 4
        ON CONFLICT (hour, provider_id, model_name, user_id, project_id) DO UPDATE
           SET (requests, errors, prompt_tokens, completion_tokens, cost_usd, latency_ms)
               = (u.requests + excluded.requests, u.errors + excluded.errors,
                  u.prompt_tokens + excluded.prompt_tokens, u.completion_tokens + excluded.completion_tokens,
                  u.cost_usd + excluded.cost_usd, u.latency_ms + excluded.latency_ms))
"""
_AFTER_BEADS = """,
    linked AS (
        INSERT INTO bead_blockers (bead_id, blocker_id) SELECT id, unnest(blocked_by) FROM written
            ON CONFLICT DO NOTHING),
    children AS (
        UPDATE beads p SET open_children = p.open_children + c.n FROM (
            SELECT w.parent, count(*) AS n
              FROM written w LEFT JOIN staged_beads q ON q.id = w.parent AND q.fate IN ('new', 'before')
             WHERE w.parent IS NOT NULL AND w.status <> 'closed' AND q.id IS NULL GROUP BY 1) AS c
         WHERE p.id = c.parent)
"""
