"""Makes rows of Loom's kinds from records of a source, whose fields may be missing, unknown or of any type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loom.transfer.kinds import KEPT, Kind
from loom.transfer.report import Report
from loom.transfer.stage import Row
from loom.transfer.values import Bad, Converter, json_object, loads, moment, repaired, written

_CUT = re.compile(r"\.\d{6}\d*[1-9]")  # digits that PostgreSQL does not keep
CUT = 26  # characters of a time with microseconds
# Of which each may stand for another one, the nearest first.
TIMES = ("created_at", "started_at", "last_active", "updated_at")


@dataclass(frozen=True)
class Form:
    """How the records of a table become rows.

    fields: name in the source -> column and converter. defaults: of columns that may not be null. words: column ->
    the values that Loom has, and what others become; the last one is for all that are not listed. ignored: names of
    what Loom derives.
    """

    kind: Kind
    fields: Mapping[str, tuple[str, Converter]]
    defaults: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, tuple[tuple[str, ...], Mapping[str, str], str]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()


class Builder:
    """Builds the rows of records that have the same names, for one table of the report."""

    def __init__(self, form: Form, names: Sequence[str], report: Report, file_time: str) -> None:
        self._form, self._report, self._file_time = form, report, file_time
        self._table, self._columns = form.kind.table, form.kind.columns
        self._counts = report.of(self._table)
        self._template = [form.defaults.get(column) for column in self._columns]
        self._known: list[tuple[int, int, Converter]] = []  # place in the record, place in the row
        self._more: list[tuple[int, str]] = []
        self._names = list(names)
        for place, name in enumerate(names):
            found = form.fields.get(name.lower())
            if found:
                self._known.append((place, self._columns.index(found[0]), found[1]))
            elif name.lower() not in form.ignored:
                self._more.append((place, name))
        self._key = self._columns.index(form.kind.key)
        self._words = [(self._columns.index(column), *words) for column, words in form.words.items()]
        at = self._columns.index
        self._times = [
            (at(column), [at(other) for other in form.kind.columns if other in TIMES and other != column])
            for column in TIMES
            if column in form.kind.columns
        ]
        self._closed = (at("status"), at("closed_at"), at("updated_at")) if "closed_at" in form.fields else None
        self._attributes = self._columns.index("attributes") if form.kind.kept else None

    def build(self, n: int, origin: str, record: Sequence[Any], more: Mapping[str, Any] | None = None) -> Row | None:
        """None if the row cannot be carried; then the report says why. more: further attributes."""
        self._counts.read += 1
        row = self._template[:]
        extra: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        for place, at, convert in self._known:
            value = record[place]
            try:
                found = convert(value)
            except Bad as bad:
                if at == self._key:
                    self._report.leave_out(self._table, origin, bad.reason)
                    return None
                self._report.note(self._table, origin, self._names[place], bad.reason, value)
                found = bad.instead
                self._keep(extra, self._names[place], value, origin)
            if found is not None:
                row[at] = found
                if convert is moment and len(value) > CUT and _CUT.search(value):
                    self._report.map(self._table, self._columns[at], "nanoseconds → microseconds")
        if row[self._key] is None:
            self._report.leave_out(self._table, origin, "has no id")
            return None
        for at, own, others, unknown in self._words:
            word = row[at]
            if word not in own:
                row[at] = self._mapped(at, word, others, unknown, origin, kept)
        self._fill_times(row, kept)
        for name, value in (more or {}).items():
            self._keep(extra, name, value, origin)
        for place, name in self._more:
            if record[place] not in (None, ""):
                self._keep(extra, name, record[place], origin)
        if self._attributes is not None and (extra or KEPT in (row[self._attributes] or "")):
            self._merge(row, extra, kept, origin)
        elif extra:
            for name in extra:
                self._report.map(self._table, name, "not carried: Loom has no column for it")
        return Row(self._form.kind, n, origin, row, kept)

    def _keep(self, extra: dict[str, Any], name: str, value: Any, origin: str) -> None:
        """In the attributes, as JSON can have it."""
        kept = repaired(name)
        try:
            written(value)
        except Bad as bad:
            self._report.note(self._table, origin, kept, bad.reason, value)
            value = repaired(value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value))
        if kept != name:
            self._report.note(self._table, origin, kept, "the name holds a NUL character, or is not UTF-8")
        extra[kept] = value

    def _mapped(
        self, at: int, word: str | None, others: Mapping[str, str], unknown: str, origin: str, kept: dict[str, Any]
    ) -> str:
        column = self._columns[at]
        if not word:
            return self._form.defaults.get(column, unknown)
        if word in others:
            self._report.map(self._table, column, f"{word} → {others[word]}")
        else:
            self._report.note(self._table, origin, column, f"is not known: {unknown}", word)
        kept[column] = word
        return others.get(word, unknown)

    def _fill_times(self, row: list[str | None], kept: dict[str, Any]) -> None:
        """One time stands for another; without any, that of the file. What is closed has a time, and only that."""
        given = [row[at] for at, _ in self._times]
        if None in given:
            if not any(given):
                self._report.map(self._table, "created_at", "none → the time of the file")
            for at, others in self._times:
                row[at] = row[at] or next((row[other] for other in others if row[other]), self._file_time)
        if self._closed:
            status, closed_at, updated_at = self._closed
            if row[status] == "closed" and row[closed_at] is None:
                self._report.map(self._table, "closed_at", "none, of what is closed → updated_at")
                row[closed_at] = row[updated_at]
            elif row[status] != "closed" and row[closed_at] is not None:
                self._report.map(self._table, "closed_at", "of what is not closed → none")
                kept["closed_at"], row[closed_at] = row[closed_at], None

    def _merge(self, row: list[str | None], extra: Mapping[str, Any], kept: dict[str, Any], origin: str) -> None:
        assert self._attributes is not None
        own = loads(row[self._attributes] or "{}")
        before = own.pop(KEPT, None)
        kept |= before if isinstance(before, dict) else {}
        row[self._attributes] = json_object({**extra, **own})
        for name in extra.keys() & own.keys():
            self._report.note(self._table, origin, name, "is also an attribute, which stays", extra[name])


class Builders:
    """Builders for records whose names differ from one to the next."""

    def __init__(self, form: Form, report: Report, file_time: str) -> None:
        self._form, self._report, self._file_time = form, report, file_time
        self._made: dict[tuple[str, ...], Builder] = {}

    def build(self, n: int, origin: str, record: Mapping[str, Any], more: Mapping[str, Any]) -> Row | None:
        names = tuple(record)
        if names not in self._made:
            if len(self._made) > 1000:
                self._made.clear()
            self._made[names] = Builder(self._form, names, self._report, self._file_time)
        return self._made[names].build(n, origin, list(record.values()), more)
