"""The file of `loom export`: all shared state, as JSON lines in gzip.

The first line is the header. A line with an array, ["table", name], begins a table, whose rows follow, one object a
line. The last line, ["end", {...}], has the rows of each table and the SHA-256 of all bytes before it.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from loom.db.schema import VERSION as SCHEMA
from loom.transfer.errors import SourceError

FORMAT = "loom export"
VERSION = 1
MAX_LINE = 64 * 2**20  # a row of an event may have a few MiB; more is no row of ours

# Table -> its key; in the order in which they are restored.
TABLES = {
    **{"providers": "id", "projects": "id", "agents": "id", "config": "key", "beads": "id"},
    **{"bead_blockers": "blocker_id, bead_id", "comments": "id", "claims": "fencing_token", "grants": "fencing_token"},
    **{"distributed_locks": "lock_name", "events": "place", "event_numbers": "id", "event_gaps": "first"},
    **{"request_logs": "timestamp, id", "model_usage": "hour, provider_id, model_name, user_id, project_id"},
    **{"cluster": "only_row"},
}
SEQUENCES = ("fencing_tokens", "bead_numbers", "project_numbers", "events_place_seq")
# Of the registry, of waiting, of retries and of monitoring, which end with the cluster; and how far an import has come.
LEFT_OUT = ("instances", "traffic", "lock_waiters", "idempotency_keys", "imports", "schema_version")
# Keys of shared values that may hold a secret: neither they nor their history are written.
SECRET = "(password|passwd|secret|token|credential|api_?key|private_?key)"


class Header(msgspec.Struct):
    """The first line."""

    format: str
    version: int
    schema: int
    exported_at: str
    columns: dict[str, list[str]]
    sequences: dict[str, int]


class End(msgspec.Struct):
    """The last line."""

    rows: dict[str, int]
    sha256: str


class Line(NamedTuple):
    """A row of a table, as its bytes."""

    table: str
    row: bytes


class Archive:
    """A file that has been read once, to its end: it is whole, and of a version that this Loom knows."""

    def __init__(self, file: Path) -> None:
        """Raises SourceError."""
        self.file = file
        self.rows: dict[str, int] = {}
        self.header = self._check()

    def _check(self) -> Header:
        digest = hashlib.sha256()
        counts: dict[str, int] = {}
        table, header = "", None
        end: End | None = None
        for raw in self._raw():
            if end is not None:
                raise self._wrong("goes on behind its end")
            if header is None:
                header = self._header(raw)
            elif raw.startswith(b'["end"'):
                end = self._end(raw)
                if end.sha256 != digest.hexdigest():
                    raise self._wrong("is damaged: its digest is another")
                continue
            elif raw.startswith(b"["):
                table = self._table(raw)
                counts[table] = 0
            elif table:
                counts[table] += 1
            else:
                raise self._wrong("is damaged: it has a row outside a table")
            digest.update(raw)
        if header is None or end is None:
            raise self._wrong("is cut off")
        if end.rows != counts:
            raise self._wrong("is damaged: it has other rows than it says")
        self.rows = counts
        return header

    def lines(self) -> Iterator[Line]:
        """The rows, table by table."""
        table = ""
        for number, raw in enumerate(self._raw()):
            if raw.startswith(b"["):
                table = msgspec.json.decode(raw)[1]
            elif number:
                yield Line(table, raw)

    def _raw(self) -> Iterator[bytes]:
        try:
            with gzip.open(self.file) as lines:
                while raw := lines.readline(MAX_LINE):
                    yield raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
            raise self._wrong(f"is cut off or damaged: {exc}") from None
        except OSError as exc:
            raise self._wrong(f"cannot be read: {exc.strerror or exc}") from None

    def _header(self, raw: bytes) -> Header:
        try:
            found: dict[str, Any] = msgspec.json.decode(raw, type=dict[str, Any])
        except msgspec.MsgspecError:
            found = {}
        if found.get("format") != FORMAT:
            raise self._wrong("is no export of Loom")
        for name, ours in (("version", VERSION), ("schema", SCHEMA)):
            if not isinstance(found.get(name), int) or found[name] > ours:
                raise self._wrong(f"has {name} {found.get(name)}, and this Loom knows {ours}: upgrade this Loom")
        try:
            return msgspec.convert(found, Header)
        except msgspec.ValidationError as exc:
            raise self._wrong(f"has a header that is wrong: {exc}") from None

    def _end(self, raw: bytes) -> End:
        try:
            return msgspec.json.decode(raw, type=tuple[str, End])[1]
        except msgspec.MsgspecError:
            raise self._wrong("is damaged: its last line is wrong") from None

    def _table(self, raw: bytes) -> str:
        try:
            word, name = msgspec.json.decode(raw, type=tuple[str, str])
        except msgspec.MsgspecError:
            word, name = "", ""
        if word != "table" or name not in TABLES:
            raise self._wrong(f"has a table that this Loom does not know: {name}")
        return name

    def _wrong(self, what: str) -> SourceError:
        return SourceError(f"{self.file}: {what}")
