"""What became of each row of a source: counts, and every value that did not arrive as it was, with the reason."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

SHOWN = 20  # notes of one table that are shown on the terminal; the report as JSON has all
SHOWN_VALUE = 60  # characters of a value that a note quotes


@dataclass
class Counts:
    """Of the rows of one table. `read` is the sum of those below it."""

    read: int = 0
    written: int = 0
    replaced: int = 0
    same: int = 0  # there already, and equal
    before: int = 0  # written by the import that this one continues
    skipped: int = 0  # there already, and different
    left_out: int = 0  # not carried: a note says why

    @property
    def carried(self) -> int:
        return self.written + self.replaced + self.same + self.before


@dataclass
class Verified:
    """The two sides of one table: rows, and the sum of the digests of all rows."""

    source_rows: int = 0
    source_digest: str = ""
    loom_rows: int = 0
    loom_digest: str = ""
    changed_since: int = 0  # by others, after they were imported
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences and (self.source_rows, self.source_digest) == (self.loom_rows, self.loom_digest)


class Report:
    """Filled by the reader, the stage and the writer. The notes are kept in a file: there may be one for each cell."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.counts: dict[str, Counts] = {}
        self.mapped: Counter[tuple[str, str, str]] = Counter()  # table, column, what became of it
        self.not_carried: dict[str, int] = {}  # tables that Loom has no place for, with their rows
        self.verified: dict[str, Verified] = {}
        self.notes = 0
        self.dry_run = False
        self._notes: TextIO = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115

    def of(self, table: str) -> Counts:
        return self.counts.setdefault(table, Counts())

    def note(self, table: str, row: str, column: str, reason: str, value: Any = None) -> None:
        """A value, or with the column "" a whole row, that did not arrive as it was."""
        self.notes += 1
        note = {"table": table, "row": row, "column": column, "reason": reason}
        if value is not None:
            text = value if isinstance(value, str) else repr(value)
            note["value"] = text if len(text) <= SHOWN_VALUE else text[: SHOWN_VALUE - 1] + "…"
        self._notes.write(json.dumps(note) + "\n")

    def leave_out(self, table: str, row: str, reason: str) -> None:
        self.of(table).left_out += 1
        self.note(table, row, "", reason)

    def map(self, table: str, column: str, change: str) -> None:
        self.mapped[table, column, change] += 1

    def each_note(self) -> Iterator[dict[str, str]]:
        self._notes.seek(0)
        yield from map(json.loads, self._notes)
        self._notes.seek(0, 2)

    @property
    def equal(self) -> bool:
        return all(side.equal for side in self.verified.values())

    def write(self, file: TextIO) -> None:
        """The whole report as JSON, note by note."""
        head = {
            "source": self.source,
            "dry_run": self.dry_run,
            "equal": self.equal,
            "tables": {table: asdict(counts) for table, counts in self.counts.items()},
            "not_carried": self.not_carried,
            "mapped": [
                {"table": table, "column": column, "change": change, "times": times}
                for (table, column, change), times in sorted(self.mapped.items())
            ],
            "verified": {table: {**asdict(side), "equal": side.equal} for table, side in self.verified.items()},
        }
        file.write(json.dumps(head, indent=1)[:-2] + ',\n "notes": [')
        for n, note in enumerate(self.each_note()):
            file.write(("," if n else "") + "\n  " + json.dumps(note))
        file.write("\n ]\n}\n")

    def lines(self) -> Iterator[str]:
        """For people."""
        columns = ("read", "written", "replaced", "same", "before", "skipped", "left_out")
        yield f"{'table':<14}" + "".join(f"{name.replace('_', ' '):>10}" for name in columns)
        for table, counts in self.counts.items():
            yield f"{table:<14}" + "".join(f"{getattr(counts, name):>10,}" for name in columns)
        if self.not_carried:
            yield "not carried:"
            yield from (plain(f"  {table}: {rows:,} rows") for table, rows in self.not_carried.items())
        if self.mapped:
            yield "mapped:"
            yield from (
                plain(f"  {table}.{column}: {change}: {times:,}")
                for (table, column, change), times in sorted(self.mapped.items())
            )
        shown: Counter[str] = Counter()
        if self.notes:
            yield "notes:"
        for note in self.each_note():
            shown[note["table"]] += 1
            if shown[note["table"]] <= SHOWN:
                where = f"{note['table']} {note['row']}{'.' + note['column'] if note['column'] else ''}"
                yield plain(f"  {where}: {note['reason']}{': ' + note['value'] if 'value' in note else ''}")
        yield from (f"  {table}: {n - SHOWN:,} more (--report FILE has all)" for table, n in shown.items() if n > SHOWN)
        for table, side in self.verified.items():
            if not (side.source_rows or side.loom_rows or side.changed_since or side.differences):
                continue
            word = "equal" if side.equal else "DIFFERENT"
            since = f", {side.changed_since:,} changed since" if side.changed_since else ""
            yield f"{table}: {side.source_rows:,} rows in the source, {side.loom_rows:,} in Loom{since}: {word}"
            yield f"  digests {side.source_digest} and {side.loom_digest}"
            yield from (plain(f"  {difference}") for difference in side.differences[:SHOWN])


def plain(text: str) -> str:
    """On one line, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
