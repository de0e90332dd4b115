"""Reads the original's SQLite database, of any age, or the text that `.dump` makes of it."""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from loom.transfer import values
from loom.transfer.build import Builder, Form
from loom.transfer.errors import SourceError
from loom.transfer.kinds import AGENT, COMMENT, CONFIG, PROJECT, PROVIDER, REQUEST_LOG
from loom.transfer.report import Report
from loom.transfer.stage import Row
from loom.transfer.values import array, boolean, integer, json_object, json_value, key, moment, number, reference, text

HEADER = b"SQLite format 3\x00"
_TIMES = {"created_at": ("created_at", moment), "updated_at": ("updated_at", moment)}
_TEXTS = ("name", "type", "endpoint", "model", "configured_model", "selected_model", "selection_reason")
_NUMBERS = ("last_heartbeat_latency_ms", "context_window")
_FLAGS = ("requires_key", "is_shared", "supports_function", "supports_vision", "supports_streaming")

FORMS = {
    "providers": Form(
        PROVIDER,
        {
            "id": ("id", key),
            **{name: (name, text) for name in (*_TEXTS, "description", "key_id", "owner_id", "status")},
            **{name: (name, text) for name in ("selected_gpu", "last_heartbeat_error")},
            **{name: (name, integer) for name in _NUMBERS},
            **{name: (name, number) for name in ("model_score", "cost_per_mtoken")},
            **{name: (name, boolean) for name in _FLAGS},
            "gpu_constraints_json": ("gpu_constraints", json_object),
            "metrics_json": ("metrics", json_object),
            "attributes_json": ("attributes", json_object),
            "tags_json": ("tags", array),
            "last_heartbeat_at": ("last_heartbeat_at", moment),
            **_TIMES,
        },
        {
            **dict.fromkeys((*_TEXTS, "selected_gpu", "description", "key_id", "owner_id", "last_heartbeat_error"), ""),
            **dict.fromkeys(("model_score", "cost_per_mtoken"), "0.0"),
            **dict.fromkeys(_NUMBERS, "0"),
            **dict.fromkeys(_FLAGS, "f"),
            **{"is_shared": "t", "status": "pending", "tags": "{}", "metrics": "{}", "attributes": "{}"},
        },
        {
            "status": (
                ("pending", "active", "error"),
                {"healthy": "active", "unhealthy": "error", "failed": "error"},
                "pending",
            )
        },
    ),
    "projects": Form(
        PROJECT,
        {
            "id": ("id", key),
            **{name: (name, text) for name in ("name", "description", "git_repo", "branch", "beads_path")},
            **{name: (name, text) for name in ("git_strategy", "status")},
            "parent_id": ("parent_id", reference),
            "is_perpetual": ("is_perpetual", boolean),
            "is_sticky": ("is_sticky", boolean),
            "context_json": ("context", json_object),
            "attributes_json": ("attributes", json_object),
            "due_date": ("due_date", moment),
            "closed_at": ("closed_at", moment),
            **_TIMES,
        },
        {
            **dict.fromkeys(("name", "description", "git_repo", "branch", "beads_path"), ""),
            **{"bead_prefix": "bd", "is_perpetual": "f", "is_sticky": "f", "git_strategy": "direct", "status": "open"},
            **{"context": "{}", "attributes": "{}"},
        },
        {
            "status": (("open", "closed", "reopened"), {"completed": "closed", "archived": "closed"}, "open"),
            "git_strategy": (("direct", "branch-pr"), {}, "direct"),
        },
    ),
    "agents": Form(
        AGENT,
        {
            "id": ("id", key),
            **{name: (name, text) for name in ("name", "persona_name", "status")},
            "role": ("role", values.name),
            **{name: (name, reference) for name in ("provider_id", "position_id", "current_bead", "project_id")},
            "attributes_json": ("attributes", json_object),
            "started_at": ("started_at", moment),
            "last_active": ("last_active", moment),
            **_TIMES,
        },
        {"name": "", "role": "", "persona_name": "", "status": "idle", "attributes": "{}"},
        {"status": (("paused", "idle", "working", "deciding", "blocked"), {}, "idle")},
    ),
    "config_kv": Form(
        CONFIG,
        {"key": ("key", key), "value": ("value", json_value), "updated_at": ("updated_at", moment)},
        {"value": "null", "updated_by": "loom import"},
    ),
    "bead_comments": Form(
        COMMENT,
        {
            "id": ("id", key),
            "bead_id": ("entity_id", key),
            "parent_id": ("parent_id", reference),
            **{name: (name, text) for name in ("author_id", "author_username", "content")},
            **_TIMES,
        },
        {"entity_type": "bead", "author_id": "", "author_username": "", "content": ""},
        ignored=frozenset({"edited", "deleted"}),
    ),
    "request_logs": Form(
        REQUEST_LOG,
        {
            "id": ("id", values.row_number),
            "timestamp": ("timestamp", moment),
            **{name: (name, values.name) for name in ("user_id", "method", "path", "model_name")},
            "provider_id": ("provider_id", values.provider),
            **{name: (name, integer) for name in ("prompt_tokens", "completion_tokens")},
            "latency_ms": ("latency_ms", number),
            "status_code": ("status_code", values.small_integer),
            "cost_usd": ("cost_usd", values.cost),
            "error_message": ("error_message", text),
            "metadata_json": ("metadata", json_object),
        },
        ignored=frozenset({"total_tokens", "created_at"}),
    ),
}


def read(path: Path, report: Report) -> Iterator[Row]:
    """The rows of a database, or of a dump. Raises SourceError."""
    file_time = values.moment_of_file(path)
    with _database(path) as database:
        try:
            yield from _Reader(database, report, file_time).rows()
        except sqlite3.Error as exc:
            raise SourceError(f"{path}: SQLite cannot read it: {exc}") from None


class _Reader:
    def __init__(self, database: sqlite3.Connection, report: Report, file_time: str) -> None:
        self._database, self._report, self._file_time = database, report, file_time

    def rows(self) -> Iterator[Row]:
        self._database.execute("BEGIN")  # one state of all tables, also while the original writes
        names = [name for (name,) in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        tables = {name.lower(): name for name in names if not name.lower().startswith("sqlite_")}
        for name, form in FORMS.items():
            if name in tables:
                yield from self._table(tables.pop(name), form)
        for name in sorted(tables.values()):
            (count,) = self._database.execute(f"SELECT count(*) FROM {_quoted(name)}").fetchone()
            self._report.not_carried[values.repaired(name)] = count

    def _table(self, table: str, form: Form) -> Iterator[Row]:
        try:
            cursor = self._database.execute(f"SELECT rowid, * FROM {_quoted(table)} ORDER BY rowid")
        except sqlite3.OperationalError:  # WITHOUT ROWID
            cursor = self._database.execute(f"SELECT NULL, * FROM {_quoted(table)}")
        names = [values.repaired(description[0]) for description in cursor.description[1:]]
        builder = Builder(form, names, self._report, self._file_time)
        lowered = [name.lower() for name in names]
        deleted = lowered.index("deleted") + 1 if form.kind is COMMENT and "deleted" in lowered else None
        for count, (rowid, *record) in enumerate(cursor, 1):
            n = count if rowid is None else rowid
            if deleted is not None and record[deleted - 1] in (1, "1", "true"):
                self._report.of(form.kind.table).read += 1
                self._report.leave_out(form.kind.table, str(n), "is deleted")
                continue
            row = builder.build(n, str(n), record)
            if row is not None:
                yield row


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with path.open("rb") as file:
            head = file.read(len(HEADER))
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read: {exc.strerror}") from None
    if head == HEADER or not head:
        with closing(_open(path)) as database:
            yield database
    else:
        with tempfile.TemporaryDirectory(prefix="loom-import-") as folder:
            copy = Path(folder, "dump.db")
            _load_dump(path, copy)
            with closing(_open(copy)) as database:
                yield database


def _open(path: Path) -> sqlite3.Connection:
    """Read-only. Without rights on the folder, a database that nobody writes is opened as a constant file."""
    modes = ["mode=ro"]
    wal = Path(f"{path}-wal")
    if not wal.exists() or not wal.stat().st_size:
        modes.append("mode=ro&immutable=1")
    for mode in modes:
        database = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, isolation_level=None, timeout=10)
        try:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            # Not strict: what is not UTF-8 reaches the converters.
            database.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
            return database
        except sqlite3.Error as exc:
            database.close()
            problem = exc
    raise SourceError(f"{path}: SQLite cannot open it: {problem}")


def _load_dump(path: Path, copy: Path) -> None:
    """Runs a dump's statements against a new file, and nothing that reaches beyond it."""
    database = sqlite3.connect(copy, isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.create_function("unistr", 1, _unistr, deterministic=True)
    database.set_authorizer(_allowed)
    try:
        for line, statement in _statements(path):
            try:
                _execute(database, statement)
            except sqlite3.Error as exc:
                raise SourceError(f"{path}:{line}: not a dump that SQLite can run: {exc}") from None
    finally:
        database.close()


def _allowed(action: int, first: str | None, *_: str | None) -> int:
    if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_PRAGMA and (first or "").lower() != "foreign_keys":
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and first == "load_extension":
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _statements(path: Path) -> Iterator[tuple[int, str]]:
    """The statements of a dump, each with the number of its first line."""
    parts: list[str] = []
    quotes, first = 0, 1
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        for number_, line in enumerate(file, 1):
            first = first if parts else number_
            parts.append(line)
            quotes += line.count("'")
            # A text with line breaks is looked at only where it can end.
            if quotes % 2 == 0 and line.rstrip().endswith(";"):
                statement = "".join(parts)
                if sqlite3.complete_statement(values.repaired(statement)):
                    yield first, statement
                    parts, quotes = [], 0
    if rest := "".join(parts).strip():
        yield first, rest


def _execute(database: sqlite3.Connection, statement: str) -> None:
    try:
        statement.encode()
        if "\x00" not in statement:
            database.execute(statement)
            return
    except UnicodeEncodeError:
        pass
    literals = re.compile(r"'(?:[^']|'')*'")
    database.execute(literals.sub(lambda literal: _as_bytes(literal[0]), statement))


def _as_bytes(literal: str) -> str:
    raw = literal[1:-1].replace("''", "'").encode("utf-8", "surrogateescape")
    return f"CAST(X'{raw.hex()}' AS TEXT)"


def _unistr(value: str) -> str:
    r"""SQLite's own since 3.50, in whose dumps control characters stand as \u000a."""
    return re.sub(
        r"\\(\\|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|\+[0-9a-fA-F]{6}|[0-9a-fA-F]{4})",
        lambda match: "\\" if match[1] == "\\" else chr(int(match[1].lstrip("uU+"), 16)),
        value,
    )
