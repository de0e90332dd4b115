"""`loom export` and `loom import`: a small backup, and the way out. What comes back is what was there."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import AppClient, Postgres
from harness.postgres import query

from loom import errors
from loom.transfer import archive
from loom.transfer.archive import LEFT_OUT, TABLES, Archive
from loom.transfer.errors import SourceError
from loom.transfer.export import export
from loom.transfer.restore import restore

Sql = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def other(postgres: Postgres) -> Iterator[str]:
    """An empty database to restore into."""
    name = postgres.database()
    yield postgres.dsn(name)
    postgres.drop(name)


@pytest.fixture
def used(client: AppClient, sql: Sql) -> None:
    """A database in which everything has happened once: claims, locks, deletions, comments, an odd text."""
    client.post("/api/v1/projects", {"id": "p", "name": 'Π "\\n" \x7f', "git_repo": "r", "branch": "b"})
    client.post("/api/v1/providers", {"id": "v", "model_score": 0.1, "tags": ["a,b", '"', "\\"]})
    client.post("/api/v1/agents", {"id": "a", "persona_name": "x", "project_id": "p", "provider_id": "v"})
    for n in (1, 2, 3):
        client.post("/api/v1/beads", {"title": f"\\{n}", "project_id": "p", "context": {"n": 10**30, "t": "\t\n\\"}})
    given = client.post("/api/v1/beads/bd-003/claim", {"agent_id": "a"}).json["fencing_token"]
    client.delete(f"/api/v1/beads/bd-003/claim?fencing_token={given}")
    client.patch("/api/v1/beads/bd-001", {"parent": "bd-003", "blocked_by": ["bd-002"]})
    client.post("/api/v1/beads/bd-002/comments", {"content": "hm"}, headers={"Loom-Actor": "a"})
    client.post("/api/v1/beads/bd-002/claim", {"agent_id": "a"})
    client.post("/api/v1/beads", {"id": "gone", "title": "t", "project_id": "p"})
    client.delete("/api/v1/beads/gone")
    client.put("/api/v1/config/theme", {"value": {"dark": [1, None]}})
    client.put("/api/v1/config/git_token", {"value": "hunter2"})
    token = client.post("/api/v1/locks/build", {"owner": "o"}).json["fencing_token"]
    client.delete(f"/api/v1/locks/build?fencing_token={token}")
    client.post("/api/v1/locks/deploy", {"owner": "o", "ttl_seconds": 3600})
    client.get("/api/v1/events?after=0")
    sql("SELECT open_request_logs('3 days', 1)")
    sql("INSERT INTO request_logs (timestamp, id, metadata) VALUES (now() - INTERVAL '2 days', 7, '{\"a\": \"b\"}')")
    sql("INSERT INTO model_usage VALUES (now(), 'v', 'm', '', '', 1, 0, 2, 3, 0.1, 0.5)")
    sql("DELETE FROM instances")


def content(file: Path) -> bytes:
    return gzip.decompress(file.read_bytes())


def rows(dsn: str, table: str) -> list[tuple[Any, ...]]:
    return query(dsn, f"SELECT row_to_json(t)::text FROM {table} t ORDER BY {TABLES[table]}")


def test_every_table_is_exported_or_left_out_on_purpose(sql: Sql) -> None:
    tables = {
        name
        for (name,) in sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename !~ '_[0-9]{8}$'")
    }
    assert tables == {*TABLES, *LEFT_OUT}


@pytest.mark.usefixtures("used")
def test_what_is_restored_is_what_was_there(dsn: str, other: str, tmp_path: Path, sql: Sql) -> None:
    export(dsn, tmp_path / "x.gz")
    restore(other, Archive(tmp_path / "x.gz"))
    sql("DELETE FROM config WHERE key = 'git_token'")
    for table in set(TABLES) - {"cluster", "event_gaps", "events", "event_numbers"}:
        assert rows(other, table) == rows(dsn, table) != [], table
    columns = "place, type, entity_id, version, actor, instance_id, request_id, timestamp"
    events = f"SELECT {columns} FROM events WHERE type <> 'config.deleted' ORDER BY place"
    assert query(other, events) == query(dsn, events)
    changes = "SELECT place, changes FROM events WHERE entity_id <> 'git_token' ORDER BY place"
    assert query(other, changes) == query(dsn, changes)
    export(other, tmp_path / "y.gz")
    first, second = (content(tmp_path / name).splitlines() for name in ("x.gz", "y.gz"))
    different = [line for line in zip(first, second, strict=True) if line[0] != line[1]]
    assert len(different) == 3, "header, fencing base, digest"


@pytest.mark.usefixtures("used")
def test_a_restored_cluster_never_gives_an_old_token_or_id_again(
    dsn: str, other: str, tmp_path: Path, sql: Sql
) -> None:
    export(dsn, tmp_path / "x.gz")
    later = sql("SELECT nextval('fencing_tokens') FROM generate_series(1, 1000)")[-1][0]  # granted after the export
    restore(other, Archive(tmp_path / "x.gz"))
    assert query(other, "SELECT next_fencing_token()")[0][0] > later
    assert query(other, "SELECT new_bead_id('p')") == [("bd-004",)]
    before = sql("SELECT max(id) FROM event_numbers")[0][0]
    query(other, "UPDATE beads SET title = 'new' WHERE id = 'bd-003'")
    query(other, "SELECT number_events()")
    assert query(other, "SELECT max(id) FROM event_numbers")[0][0] > before
    versions = query(other, "SELECT version FROM events WHERE entity_id = 'bd-003' ORDER BY place")
    assert versions == [(1,), (2,), (3,), (4,)]


@pytest.mark.usefixtures("used")
def test_no_secret_is_in_the_file(dsn: str, tmp_path: Path) -> None:
    export(dsn, tmp_path / "x.gz")
    assert b"hunter2" not in content(tmp_path / "x.gz")


@pytest.mark.usefixtures("used")
def test_a_cut_off_or_damaged_file_is_refused(dsn: str, tmp_path: Path) -> None:
    export(dsn, tmp_path / "x.gz")
    packed, plain = (tmp_path / "x.gz").read_bytes(), content(tmp_path / "x.gz")
    lines = plain.splitlines(keepends=True)
    broken = [packed[: len(packed) * n // 20] for n in range(20)]
    broken += [packed[:n] + bytes([packed[n] ^ 1]) + packed[n + 1 :] for n in range(12, len(packed), 97)]
    broken += [gzip.compress(b"".join(lines[:-n])) for n in (1, 2, 5)]
    broken += [gzip.compress(b"".join(lines[:-3] + lines[-2:])), gzip.compress(plain + lines[-1])]
    broken += [gzip.compress(plain.replace(b"hm", b"mh")), b"", b"no gzip", gzip.compress(b"[]\n"), packed + b"x"]
    for file in broken:
        (tmp_path / "y.gz").write_bytes(file)
        with pytest.raises(SourceError):
            Archive(tmp_path / "y.gz")


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("name", ["version", "schema"])
def test_a_file_of_a_newer_version_is_refused_with_its_number(name: str, dsn: str, tmp_path: Path) -> None:
    export(dsn, tmp_path / "x.gz")
    header, rest = content(tmp_path / "x.gz").split(b"\n", 1)
    newer = json.dumps({**json.loads(header), name: 999}).encode()
    (tmp_path / "y.gz").write_bytes(gzip.compress(newer + b"\n" + rest))
    with pytest.raises(SourceError, match=f"has {name} 999, and this Loom knows"):
        Archive(tmp_path / "y.gz")


@pytest.mark.usefixtures("used")
def test_an_export_goes_only_into_an_empty_database(dsn: str, other: str, tmp_path: Path) -> None:
    export(dsn, tmp_path / "x.gz")
    query(other, "INSERT INTO projects (id, name) VALUES ('mine', 'Mine')")
    with pytest.raises(errors.Conflict, match="There are projects in the database already"):
        restore(other, Archive(tmp_path / "x.gz"))
    assert query(other, "SELECT id FROM projects") == [("mine",)]


def test_an_export_that_fails_leaves_the_file_of_before(dsn: str, tmp_path: Path, sql: Sql) -> None:
    (tmp_path / "x.gz").write_text("the last backup")
    sql("ALTER TABLE event_gaps RENAME TO elsewhere")
    with pytest.raises(errors.Error):
        export(dsn, tmp_path / "x.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gz"]
    assert (tmp_path / "x.gz").read_text() == "the last backup"


def test_the_format_is_the_documented_one(dsn: str, tmp_path: Path) -> None:
    export(dsn, tmp_path / "x.gz")
    lines = [json.loads(line) for line in content(tmp_path / "x.gz").splitlines()]
    assert lines[0]["format"] == archive.FORMAT
    assert [line[1] for line in lines[1:] if isinstance(line, list) and line[0] == "table"] == list(TABLES)
    assert lines[-1][0] == "end"
