"""The stage: temporary tables into which all rows of a source are copied before anything is decided about them."""

from __future__ import annotations

import hashlib
import io
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import psycopg2
from psycopg2.extensions import cursor as Cursor

from loom.bounds import bounds
from loom.transfer.kinds import KEPT, KINDS, Kind
from loom.transfer.report import Report
from loom.transfer.values import written

ROWS, CHARACTERS = 10_000, 4_000_000  # of one COPY
LARGE = bounds.entity // 30  # characters of a row whose size as JSON is looked at: 1e300 has 301 digits there
NULL = "null" + secrets.token_hex(16)  # no text is equal to it


class Row(NamedTuple):
    """A row as a reader gives it. n: its order within its kind. origin: where it stands, for people.

    values: those of the kind's columns, as PostgreSQL prints them. kept: what attributes keep of the source.
    """

    kind: Kind
    n: int
    origin: str
    values: list[str | None]
    kept: Mapping[str, Any] = {}


class Link(NamedTuple):
    """That a bead waits for another, or ("parent") is its child. inverse: said by the other one."""

    bead: str
    other: str
    how: str  # blocked_by or parent
    inverse: bool
    origin: str


Source = Iterator["Row | Link"]


class Stage:
    """Fills the temporary tables, and tells the report of rows that PostgreSQL refuses."""

    def __init__(self, cur: Cursor, report: Report, progress: Callable[[int, str], None]) -> None:
        self.cur, self._report, self._progress = cur, report, progress
        self._copies: dict[str, _Copy] = {}
        for kind in KINDS:
            cur.execute(
                f"""
                CREATE TEMPORARY TABLE {kind.staged} AS
                    SELECT 0::bigint AS n, ''::text AS origin, 0 AS characters, NULL::uuid AS digest,
                           NULL::jsonb AS kept, {", ".join(kind.columns)} FROM {kind.table} WITH NO DATA;
                ALTER TABLE {kind.staged} ADD COLUMN level integer DEFAULT 0, ADD COLUMN fate text DEFAULT 'new';
                """
            )
            columns = ("n", "origin", "characters", "digest", "kept", *kind.columns)
            self._copies[kind.name] = _Copy(kind.staged, columns)
        cur.execute(
            """
            CREATE TEMPORARY TABLE staged_links (
                n bigint, bead text COLLATE "C", other text COLLATE "C", how text, inverse boolean, origin text)
            """
        )
        self._links = _Copy("staged_links", ("n", "bead", "other", "how", "inverse", "origin"))
        self._compared = {
            kind.name: itemgetter(*(kind.columns.index(column) for column in kind.compared)) for kind in KINDS
        }

    def fill(self, source: Source) -> None:
        """Takes all that a reader gives."""
        links, rows, shown = 0, 0, time.monotonic()
        for item in source:
            if isinstance(item, Link):
                links += 1
                self._links.add(
                    [str(links), item.bead, item.other, item.how, "t" if item.inverse else "f", item.origin], 100
                )
                if self._links.full:
                    self._flush(self._links)
                continue
            kind, n, origin, given, kept = item
            values = [NULL if value is None else value for value in given]
            digest = digest_of(self._compared[kind.name](given))
            copy = self._copies[kind.name]
            size = sum(map(len, values))
            copy.add([str(n), origin, str(size), digest, written(kept) if kept else NULL, *values], size)
            rows += 1
            if copy.full:
                self._flush(copy)
            if rows % 1000 == 0 and time.monotonic() - shown > 0.2:
                shown = time.monotonic()
                self._progress(rows, f"reading {kind.table}")
        for copy in (*self._copies.values(), self._links):
            self._flush(copy)
        self._progress(rows, "read")

    def _flush(self, copy: _Copy) -> None:
        rows, copy.rows, copy.characters = copy.rows, [], 0
        self._copy(copy, rows)

    def _copy(self, copy: _Copy, rows: Sequence[Sequence[str]]) -> None:
        """Copies rows; when PostgreSQL refuses them, half of them at a time until it is known which."""
        if not rows:
            return
        self.cur.execute("SAVEPOINT rows")
        try:
            copy.send(self.cur, rows)
        except psycopg2.DataError as exc:
            self._refused(copy, rows, exc)
        except psycopg2.IntegrityError as exc:  # of a domain
            self._refused(copy, rows, exc)
        else:
            self.cur.execute("RELEASE SAVEPOINT rows")

    def _refused(self, copy: _Copy, rows: Sequence[Sequence[str]], exc: psycopg2.Error) -> None:
        self.cur.execute("ROLLBACK TO SAVEPOINT rows; RELEASE SAVEPOINT rows")
        if len(rows) == 1:
            table = copy.table.removeprefix("staged_")
            self._report.leave_out(table, str(rows[0][1]), f"PostgreSQL refuses it: {exc.diag.message_primary}")
            return
        half = len(rows) // 2
        self._copy(copy, rows[:half])
        self._copy(copy, rows[half:])

    def each(self, sql: str, **params: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, a few at a time."""
        with self.cur.connection.cursor(name="each") as cur:
            cur.itersize = 2000
            cur.execute(sql, params or None)
            yield from cur

    def leave_out(self, kind: Kind, where: str, reason: str) -> None:
        """Removes rows of the stage, `s`; each is reported. reason: SQL."""
        if self._pick(kind, where, reason):
            for origin, why in self.each("SELECT origin, picked FROM picked ORDER BY at"):
                self._report.leave_out(kind.table, origin, why)
            self.cur.execute(f"DELETE FROM {kind.staged} WHERE ctid IN (SELECT at FROM picked)")

    def unset(self, kind: Kind, column: str, where: str, reason: str) -> None:
        """Empties a reference of the stage's rows, `s`, that leads nowhere; attributes keep it, if there are any."""
        if self._pick(kind, f"s.{column} IS NOT NULL AND {where}", f"s.{column}"):
            for origin, value in self.each("SELECT origin, picked FROM picked ORDER BY at"):
                self._report.note(kind.table, origin, column, reason, value)
            keep = f", kept = COALESCE(kept, '{{}}') || jsonb_build_object('{column}', picked)" if kind.kept else ""
            self.cur.execute(f"UPDATE {kind.staged} s SET {column} = NULL{keep} FROM picked p WHERE s.ctid = p.at")

    def _pick(self, kind: Kind, where: str, what: str) -> int:
        self.cur.execute("DROP TABLE IF EXISTS picked")
        self.cur.execute(
            f"CREATE TEMPORARY TABLE picked AS SELECT s.ctid AS at, s.origin, {what} AS picked"
            f" FROM {kind.staged} s WHERE {where}"
        )
        return self.cur.rowcount


def digest_of(values: Any) -> str:
    return hashlib.md5(repr(values).encode(), usedforsecurity=False).hexdigest()


def attributes(kind: Kind, alias: str = "s") -> str:
    """The column `attributes` of a staged row as it is written, in SQL."""
    return (
        f"CASE WHEN {alias}.kept IS NULL THEN {alias}.attributes::jsonb"
        f" ELSE {alias}.attributes || jsonb_build_object('{KEPT}', {alias}.kept) END"
    )


_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def _line(row: Sequence[str]) -> str:
    """A row as COPY has it. Few values have something to escape."""
    line = "\t".join(row)
    if "\\" in line or "\n" in line or "\r" in line or line.count("\t") >= len(row):
        line = "\t".join([value.translate(_ESCAPES) for value in row])
    return line + "\n"


class _Copy:
    """Rows that wait for the next COPY into a table."""

    def __init__(self, table: str, columns: Sequence[str]) -> None:
        self.table, self._columns = table, ", ".join(columns)
        self.rows: list[Sequence[str]] = []
        self.characters = 0

    def add(self, row: Sequence[str], characters: int) -> None:
        self.rows.append(row)
        self.characters += characters

    @property
    def full(self) -> bool:
        return len(self.rows) >= ROWS or self.characters >= CHARACTERS

    def send(self, cur: Cursor, rows: Sequence[Sequence[str]]) -> None:
        text = "".join(_line(row) for row in rows)
        cur.copy_expert(f"COPY {self.table} ({self._columns}) FROM STDIN (NULL '{NULL}')", io.StringIO(text))
