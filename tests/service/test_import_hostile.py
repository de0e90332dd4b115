"""Whatever stands in a database or a bead file arrives right, or is in the report; and never ends in a traceback."""

from __future__ import annotations

import itertools
import json
import math
import re
import sqlite3
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extras
import pytest
from harness import imports, legacy
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from loom.transfer.report import Report

GO_TIMES = [
    "2026-01-20 08:00:00.123456789-08:00",
    "2026-01-20T08:00:00Z",
    "2026-01-20 08:00:00",
    "2026-01-20T08:00:00.5+05:30",
    "2026-01-20 08:00:00.123456789 -0800 PST m=+0.012",
    "2026-01-20 08:00:00 +0000 UTC",
    "2026-01-20 08:00:00.1 +0530 +0530",
    "0001-01-01 00:00:00+00:00",
    "0001-01-01T00:00:00Z",
    "9999-12-31 23:59:59.999999999-08:00",
    "10000-01-01 00:00:00",
    "2026-02-30 00:00:00",
    "2026-01-20 24:00:00",
    "yesterday",
]
WORDS = ["", "plain", "with space (Default)", "a/b", "é", "e\u0301", "😀", "\\N", "\\.", "x\n\\.\ny", "\r", "\r\n",
         "\n",
         '"', "'", "''", "{a,b}", "NULL", "null", "a,b", "\t", "\x1b[31m", "\x01", "\x7f", "a\x00b", "\ufffd", "\ufeff",
         "%s", "%(source)s", "$1", "x" * 201, "x" * 5000, "..", "-1", "0", "1", "true", "FALSE", "1e999", "NaN",
         "9223372036854775807", "9223372036854775808", "1.0", " 42 ", "0x10", "١"]  # fmt: skip
JSONS = ['{"a": 1}', '{"a": 1.10, "b": 1e400}', '{"a": "\\u0000"}', '{"a": "\\ud800"}', '{"a": 1, "a": 2}', "{", "[]",
         '["a", "b"]', '["a", 1, true]', '["a", null]', '{"deep": ' + "[" * 120 + "]" * 120 + "}",
         '{"big": ' + "9" * 320 + "}", '{"exact": 0.1000000000000000055511151231257827}', "null",
         '{"loom_import": {"status": "x"}}', "5",
         '{"é": ["\\\\", "\\n"]}', '{"a": NaN}', '{"a": -0}', '{"tiny": 1e-320}', "[" * 5000]  # fmt: skip
RAW = [b"\xff\xfe", b"ok", b"\xed\xa0\x80", b"a\x00b", b""]
NUMBERS = [0, 1, 2, -1, 4, 5, 2**53, 2**63 - 1, -(2**63), 0.5, 1e300, math.inf, -0.0, 3.0]
HOSTILE = st.one_of(
    st.sampled_from([None, *GO_TIMES, *WORDS, *JSONS, *RAW, *NUMBERS]),
    st.text(max_size=20).filter(lambda text: text < "\ud800" or text.isprintable()),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.binary(max_size=8),
)
BROKEN = sorted({bytes.fromhex("22ff22"), b"caf\xe9"})  # as text that is not UTF-8

# What a column holds in Loom: table of the source -> its table, and column of the source -> column and type there.
TEXT, INTEGER, NUMBER, FLAG, TIME, OBJECT, LIST, WORD, LINK = (
    "text", "integer", "number", "flag", "time", "object", "list", "word", "link"
)  # fmt: skip
CHECKED: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "providers": ("providers", {
        **{name: (name, TEXT) for name in ("name", "endpoint", "model", "owner_id", "last_heartbeat_error")},
        "status": ("status", WORD), "model_score": ("model_score", NUMBER),
        "context_window": ("context_window", INTEGER),
        "requires_key": ("requires_key", FLAG), "supports_vision": ("supports_vision", FLAG),
        "last_heartbeat_at": ("last_heartbeat_at", TIME), "metrics_json": ("metrics", OBJECT),
        "tags_json": ("tags", LIST)}),
    "projects": ("projects", {
        **{name: (name, TEXT) for name in ("name", "git_repo", "branch")}, "parent_id": ("parent_id", LINK),
        "status": ("status", WORD), "git_strategy": ("git_strategy", WORD), "is_sticky": ("is_sticky", FLAG),
        "due_date": ("due_date", TIME), "context_json": ("context", OBJECT)}),
    "agents": ("agents", {
        **{name: (name, TEXT) for name in ("name", "role", "persona_name")}, "provider_id": ("provider_id", LINK),
        "project_id": ("project_id", LINK), "status": ("status", WORD), "started_at": ("started_at", TIME),
        "last_active": ("last_active", TIME)}),
    "bead_comments": ("comments", {"content": ("content", TEXT), "author_id": ("author_id", TEXT)}),
    "config_kv": ("config", {}),
}  # fmt: skip
KEYS = {"config_kv": "key"}


@st.composite
def databases(draw: Callable[..., Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Tables with some of their columns, one unknown column, and a few rows."""
    found = {}
    for table, columns in legacy.TABLES.items():
        if table not in CHECKED or draw(st.integers(0, 9)) == 0:
            continue
        key = KEYS.get(table, "id")
        known = [column.split()[0] for column in re.split(r",\s*", columns)]
        names = [name for name in known if name == key or draw(st.integers(0, 4))] + ["later_column"]
        keys = st.one_of(HOSTILE, st.sampled_from(["a", "b", "A"]))
        beads = st.sampled_from(["bead", "bead", "gone"])
        special = {key: keys, "bead_id": beads}
        rows = draw(st.lists(st.tuples(*(special.get(name, HOSTILE) for name in names)), max_size=6))
        found[table] = (names, [list(row) for row in rows])
    return found


def make(file: Path, tables: dict[str, tuple[list[str], list[list[Any]]]]) -> None:
    file.unlink(missing_ok=True)
    conn = sqlite3.connect(file)
    for table, (names, rows) in tables.items():
        conn.execute(f"CREATE TABLE {table} ({', '.join(names)})")
        for row in rows:
            marks = ["CAST(? AS TEXT)" if value in BROKEN else "?" for value in row]
            conn.execute(f"INSERT INTO {table} VALUES ({', '.join(marks)})", row)
    conn.commit()
    conn.close()


def as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    return repr(value) if isinstance(value, float) else str(value)


def as_time(value: str) -> datetime | None:
    """A second reading of Go's times, by Python's own parser."""
    value = re.sub(r" [A-Z]{3,4}$| [+-]\d{4}$(?<=\d{4} [+-]\d{4})", "", re.sub(r" m=.*", "", value))
    value = re.sub(r"(\.\d{6})\d+", r"\1", re.sub(r"\.(\d{1,5})(?!\d)", lambda m: "." + m[1].ljust(6, "0"), value))
    value = re.sub(r" ?([+-]\d\d):?(\d\d)$", r"\1:\2", value.replace("Z", "+00:00"))
    found = datetime.fromisoformat(value)
    found = found.astimezone(timezone.utc) if found.tzinfo else found.replace(tzinfo=timezone.utc)
    return None if found.year == 1 else found


def arrived(kind: str, value: Any, row: dict[str, Any], column: str) -> bool:
    """Whether a value of the source is in Loom as it was."""
    found = row[column]
    kept = row.get("attributes", {}).get("loom_import", {})
    if value in (None, "") or value == b"":
        return (
            found in (None, "", 0, 0.0, False, {}, [])
            or column in ("status", "git_strategy", "started_at")
            or (column in ("last_active",) or (column, found) == ("is_shared", True))
        )
    if kind == TEXT:
        return found == as_text(value)
    if kind == WORD:
        return as_text(value) in (found, kept.get(column))
    if kind == LINK:
        return found == as_text(value)
    if kind == INTEGER:
        return found == int(value)
    if kind == NUMBER:
        return found == float(value)
    if kind == FLAG:
        return found == (as_text(value).strip().lower() in ("1", "true", "yes", "on", "t"))
    if kind == TIME:
        expected = as_time(value)
        return found == expected or (expected is None and column in ("started_at", "last_active"))
    wanted = json.loads(value)
    if kind == LIST:
        return found == [item if isinstance(item, str) else json.dumps(item) for item in wanted or []]
    return json.loads(json.dumps(found)) == (wanted or {})


def check(tables: dict[str, tuple[list[str], list[list[Any]]]], report: Report, dsn: str) -> None:
    noted = {(table, row, column) for table, row, column, _ in imports.notes(report)}
    with psycopg2.connect(dsn) as conn, conn.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
        for source, (names, rows) in tables.items():
            table, columns = CHECKED[source]
            key = KEYS.get(source, "id")
            cursor.execute(f"SELECT * FROM {table}")
            there = {row[key]: dict(row) for row in cursor.fetchall()}
            for number, record in enumerate(rows, 1):
                values = dict(zip(names, record, strict=True))
                if (table, str(number), "") in noted:
                    continue
                row = there[as_text(values[key])]
                for name, (column, kind) in columns.items():
                    if name in values and not {(table, str(number), n) for n in (name, column)} & noted:
                        assert arrived(kind, values[name], row, column), (source, number, name, values[name], row)
                extra = values["later_column"]
                if (
                    "attributes" in row
                    and extra not in (None, "")
                    and (table, str(number), "later_column") not in noted
                ):
                    kept = row["attributes"]["later_column"]
                    assert kept == extra or isinstance(extra, bytes | float) or "\x00" in str(extra), (extra, kept)


@pytest.fixture
def clean(dsn: str) -> Callable[[], None]:
    def run() -> None:
        with psycopg2.connect(dsn) as conn, conn.cursor() as cursor:
            for table in ("comments", "beads", "agents", "projects", "providers", "config", "events"):
                cursor.execute(f"DELETE FROM {table}")

    return run


def test_each_hostile_value_in_each_column_arrives_or_is_in_the_report(dsn: str, tmp_path: Path) -> None:
    values = [*GO_TIMES, *WORDS, *JSONS, *RAW, *NUMBERS, *BROKEN]
    large = ("name", "role", "tags_json", "context_json", "content", "value", "project_id")
    tables = {}
    for table, columns in legacy.TABLES.items():
        if table in CHECKED:
            key = KEYS.get(table, "id")
            names = [column.split()[0] for column in re.split(r",\s*", columns)] + ["later_column"]
            names.sort(key=lambda name, key=key: name != key)
            empty = {"bead_id": "bead"} if table == "bead_comments" else {}
            places = [(name, value) for name in names for value in values]
            places += [(name, "x" * 1_100_000) for name in names if name in large]
            if table == "config_kv":  # which has room for 1,000 keys
                places = [(name, value) for name, value in places if name in ("key", "value")]
            rows = [{**empty, key: f"row {n}", name: value} for n, (name, value) in enumerate(places)]
            tables[table] = (names, [[row.get(name) for name in names] for row in rows])
    legacy.folder(tmp_path / ".beads", [{"id": "bead", "title": "t", "created_at": "2026-01-20T08:00:00Z"}])
    make(tmp_path / "old.db", tables)
    report = imports.run(dsn, tmp_path / "old.db", tmp_path / ".beads")
    assert report.equal, list(report.lines())
    check(tables, report, dsn)


def test_each_hostile_value_in_each_key_of_a_bead_arrives_or_is_in_the_report(
    dsn: str, tmp_path: Path, sql: Any
) -> None:
    words = [word for word in [*GO_TIMES, *WORDS, *JSONS] if len(word) < 1000]
    values = [*words, *NUMBERS[:9], True, None, [], ["a", 1], [None], [["x"]], {}, {"a": [1, {"b": None}]}, {"\x00": 1}]
    keys = ("title", "description", "status", "priority", "type", "projectid", "assignedto", "blockedby", "children",
            "parent", "tags", "context", "createdat", "closedat",
            "estimatedtime", "entitymetadata", "later")  # fmt: skip
    places = [(key, value) for key in keys for value in values]
    folder = tmp_path / ".beads/beads"
    folder.mkdir(parents=True)
    for n, (key, value) in enumerate(places):
        text = json.dumps({"id": f"y-{n}", key: value}, ensure_ascii=n % 2 == 0)  # JSON is YAML
        (folder / f"{n}.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    issues = (json.dumps({"id": f"j-{n}", key: value}) for n, (key, value) in enumerate(places))
    (folder / "issues.jsonl").write_text("\n".join(issues))
    report = imports.run(dsn, folder=tmp_path / ".beads")
    assert report.equal, list(report.lines())
    noted = {row for table, row, _, _ in imports.notes(report) if table == "beads"}
    found = {name: (title, description) for name, title, description in sql("SELECT id, title, description FROM beads")}
    for n, (key, value) in enumerate(places):
        for name, row in ((f"y-{n}", f"beads/{n}.yaml"), (f"j-{n}", f"issues.jsonl:{n + 1}")):
            assert row in noted or name in found, (key, value)
            if row not in noted and key in ("title", "description") and isinstance(value, str):
                assert value in found[name], (row, value)


def test_every_value_of_a_database_arrives_or_is_in_the_report(
    dsn: str, clean: Callable[[], None], tmp_path: Path, seed: int, long: bool
) -> None:
    legacy.folder(tmp_path / ".beads", [{"id": "bead", "title": "t", "created_at": "2026-01-20T08:00:00Z"}])
    ends = time.monotonic() + 600
    for n in itertools.count() if long else [0]:

        @hypothesis_seed(seed + n)
        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(databases())
        def run(tables: dict[str, tuple[list[str], list[list[Any]]]]) -> None:
            clean()
            make(tmp_path / "old.db", tables)
            report = imports.run(dsn, tmp_path / "old.db", tmp_path / ".beads")
            assert report.equal, list(report.lines())
            assert all(line.isprintable() for line in report.lines())
            imports.as_json(report)
            check(tables, report, dsn)

        run()
        if time.monotonic() > ends:
            break
