"""Compares what a source gave with what is in Loom: each row by a digest that was made before it was written."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import NamedTuple

from loom.transfer.kinds import KEPT, KINDS, Kind
from loom.transfer.report import Report, Verified
from loom.transfer.stage import NULL, Stage, digest_of
from loom.transfer.values import json_value

CARRIED = "('new', 'same', 'replace', 'before')"
MOST_DIFFERENCES = 1000  # that are looked at one by one
_DIGITS = 1 << 128


class _Differing(NamedTuple):
    key: str
    there: bool
    digest: int


def verify(stage: Stage, report: Report) -> bool:
    """Whether every row that was carried is there as the source has it."""
    csv.field_size_limit(2**31 - 1)
    for kind in KINDS:
        report.verified[kind.table] = _Reader(stage, kind).compare()
    return report.equal


class _Reader:
    """Takes the rows of one table as COPY writes them."""

    def __init__(self, stage: Stage, kind: Kind) -> None:
        self._stage, self._kind, self._side = stage, kind, Verified()
        self._source = self._loom = 0
        self._differing: list[_Differing] = []
        self._forms: list[tuple[int, Callable[[str], str]]] = [
            *((kind.compared.index(column), json_value) for column in kind.objects if column in kind.compared),
            *((kind.compared.index(column), _number) for column in kind.numbers),
        ]

    def compare(self) -> Verified:
        kind = self._kind
        columns = [f"t.attributes - '{KEPT}'" if column == "attributes" else f"t.{column}" for column in kind.compared]
        same = " AND ".join(f"s.{column} IS NOT DISTINCT FROM t.{column}" for column in kind.references) or "true"
        self._stage.cur.copy_expert(
            f"""
            COPY (SELECT s.{kind.key}, s.digest, t.{kind.key} IS NOT NULL, {same}, {", ".join(columns)}
                    FROM {kind.staged} s LEFT JOIN {kind.table} t USING ({kind.key}) WHERE s.fate IN {CARRIED})
              TO STDOUT (FORMAT csv, NULL '{NULL}')
            """,
            self,
        )
        for row in self._differing:
            self._look_at(row)
        self._side.source_digest, self._side.loom_digest = (f"{n % _DIGITS:032x}" for n in (self._source, self._loom))
        return self._side

    def write(self, line: str | bytes) -> int:
        """One row: COPY sends each in a message of its own."""
        text = line.decode() if isinstance(line, bytes) else line
        (row,) = csv.reader([text])
        key, expected, there, same = row[:4]
        values = row[4:]
        for place, form in self._forms:
            if values[place] not in ("{}", NULL):
                values[place] = form(values[place])
        digest = int(digest_of(tuple(None if value == NULL else value for value in values)), 16)
        source = int(expected.replace("-", ""), 16)
        self._side.source_rows += 1
        self._source += source
        if there == "t" and same == "t" and digest == source:
            self._side.loom_rows += 1
            self._loom += digest
        else:
            self._differing.append(_Differing(key, there == "t", digest))
        return len(text)

    def _look_at(self, row: _Differing) -> None:
        """A row that somebody has changed since its import is no difference."""
        kind = self._kind
        self._stage.cur.execute(
            "SELECT type FROM events WHERE entity_type = %s AND entity_id = %s ORDER BY place DESC LIMIT 1",
            (kind.name, row.key),
        )
        last = self._stage.cur.fetchone()
        if last and last[0] != f"{kind.name}.imported":
            self._side.changed_since += 1
            self._stage.cur.execute(f"SELECT digest FROM {kind.staged} WHERE {kind.key} = %s", (row.key,))
            ((digest,),) = self._stage.cur.fetchall()
            self._source -= int(str(digest).replace("-", ""), 16)
            self._side.source_rows -= 1
        elif not row.there:
            self._side.differences.append(f"{kind.name} {row.key}: is not in Loom")
        else:
            self._side.loom_rows += 1
            self._loom += row.digest
            self._side.differences.append(f"{kind.name} {row.key}: {', '.join(self._columns(row.key))}")

    def _columns(self, key: str) -> list[str]:
        kind = self._kind
        own = {"attributes": f"t.attributes - '{KEPT}'"}
        differ = ", ".join(f"s.{c} IS DISTINCT FROM {own.get(c, f't.{c}')}" for c in kind.columns)
        self._stage.cur.execute(
            f"SELECT {differ} FROM {kind.staged} s JOIN {kind.table} t USING ({kind.key}) WHERE s.{kind.key} = %s",
            (key,),
        )
        (row,) = self._stage.cur.fetchall()
        return [column for column, differs in zip(kind.columns, row, strict=True) if differs] or ["its digest"]


def _number(text: str) -> str:
    return repr(float(text))
