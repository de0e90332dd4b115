"""`loom import-sqlite`: trusted with the only copy of a database, so nothing is lost or changed silently."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from harness import AppClient, imports, legacy
from harness.imports import mapped, notes

from loom import config, errors
from loom.transfer.errors import SourceError

Sql = Callable[..., list[tuple[Any, ...]]]
MANAGER = "agent-1769932530-Engineering Manager (Default)"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A database of the original, and beside it a folder of beads."""
    legacy.database(tmp_path / "old.db", legacy.some()).close()
    legacy.folder(tmp_path / ".beads", legacy.beads())
    return tmp_path / "old.db"


def loom(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loom", *arguments],
        env=config.environment(DATABASE_DSN=dsn),
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_table_arrives_with_its_times_and_ids(old: Path, dsn: str, sql: Sql) -> None:
    report = imports.run(dsn, old, old.parent / ".beads")
    assert report.equal
    assert sql("SELECT id, status, tags, attributes->'a', attributes->>'schema_version' FROM providers") == [
        ("local", "active", ["fast", "a,b", '"q"'], [1, 2.5, {"b": None}], "1.0")
    ]
    assert sql("SELECT id, parent_id, status, is_sticky, context, due_date::text FROM projects ORDER BY id") == [
        ("imported", None, "open", False, {}, None),
        ("shop", None, "open", False, {"k": "v"}, None),
        ("shop-web", "shop", "closed", True, {}, None),
    ]
    assert sql("SELECT created_at::text, updated_at::text FROM projects WHERE id = 'shop'") == [
        ("2026-01-20 16:00:00.123456+00", "2026-01-21 08:00:00+00")
    ]
    assert sql("SELECT id, provider_id, project_id, started_at::text, heartbeat_at FROM agents") == [
        (MANAGER, "local", "shop", "2026-01-20 16:00:00.123456+00", None)
    ]
    assert sql("SELECT key, value FROM config ORDER BY key") == [("motto", "plain text"), ("theme", {"dark": True})]
    assert sql("SELECT id, parent_id, project_id, content FROM comments ORDER BY id") == [
        ("c1", None, "shop", "first"),
        ("c2", "c1", "shop", "reply"),
    ]
    assert report.not_carried == {"users": 1}


def test_each_row_has_one_event_with_its_source_at_the_time_of_the_import(old: Path, dsn: str, sql: Sql) -> None:
    imports.run(dsn, old, old.parent / ".beads")
    assert sql(
        """
        SELECT e.type, count(*), min(e.version), max(e.version), count(DISTINCT e.changes->>'imported_from'),
               bool_and(e.timestamp > now() - INTERVAL '1 minute' AND e.changes ? 'created_at')
          FROM events e GROUP BY 1 ORDER BY 1
        """
    ) == [
        (f"{kind}.imported", n, 1, 1, 1, True)
        for kind, n in (("agent", 1), ("bead", 5), ("comment", 2), ("config", 2), ("project", 3), ("provider", 1))
    ]


def test_an_import_is_served_like_any_other_state(old: Path, dsn: str, client: AppClient, sql: Sql) -> None:
    imports.run(dsn, old, old.parent / ".beads", resume=True)
    assert client.get("/api/v1/beads/shop-2").json["blocked_by"] == ["shop-3"]
    assert client.get(f"/api/v1/agents/{MANAGER}").json["name"] == "Manager"
    history = client.get("/api/v1/beads/shop-1/history").json
    assert [event["type"] for event in history] == ["bead.imported"]
    assert client.post("/api/v1/beads", {"title": "new", "project_id": "shop"}).json["id"] == "bd-1001"
    assert client.post("/api/v1/beads/shop-2/claim", {"agent_id": MANAGER}).json["blocked_by"] == ["shop-3"]
    claimed = client.post("/api/v1/beads/shop-3/claim", {"agent_id": MANAGER}).json
    done = client.post("/api/v1/beads/shop-3/complete", {"fencing_token": claimed["fencing_token"]})
    assert done.status == 200
    assert sql("SELECT id, open_blockers, open_children FROM beads WHERE id = 'shop-2'") == [("shop-2", 0, 0)]
    assert len(client.get("/api/v1/events?after=0&limit=1000").json["events"]) > 14


def test_beads_are_linked_from_both_ends_in_any_order(old: Path, dsn: str, sql: Sql) -> None:
    report = imports.run(dsn, old, old.parent / ".beads")
    assert sql("SELECT id, status, parent, blocked_by, open_blockers, open_children FROM beads ORDER BY id") == [
        ("bd-1000", "open", None, [], 0, 0),
        ("shop-1", "closed", None, [], 0, 0),
        ("shop-2", "open", None, ["shop-3"], 1, 1),
        ("shop-3", "open", "shop-2", [], 0, 0),
        ("shop-4", "in_progress", None, ["shop-1"], 0, 0),
    ]
    assert ("beads", "beads/3.yaml", "blocked_by", "would close the cycle shop-2 → shop-3 → shop-2") in notes(report)
    assert sql("SELECT attributes->'loom_import' FROM beads WHERE id = 'shop-3'") == [
        ({"status": "in_progress", "assigned_to": "ghost", "blocked_by": ["shop-2"]},)
    ]
    assert sql("SELECT bead_id, blocker_id FROM bead_blockers ORDER BY 1") == [
        ("shop-2", "shop-3"),
        ("shop-4", "shop-1"),
    ]


def test_what_loom_does_not_have_is_mapped_and_counted(old: Path, dsn: str) -> None:
    found = mapped(imports.run(dsn, old, old.parent / ".beads"))
    assert found["beads.status: cancelled → closed"] == 1
    assert found["beads.assigned_to: role → the agent that has it"] == 1
    assert found["beads.status: in_progress, by an agent that is not there → open"] == 1
    assert found["beads.project_id: empty → imported"] == 1
    assert found["providers.status: healthy → active"] == 1


def test_request_logs_that_are_young_enough_arrive_with_their_totals(tmp_path: Path, dsn: str, sql: Sql) -> None:
    now = datetime.now(timezone.utc).replace(minute=30)
    use = {"provider_id": "v", "model_name": "m", "prompt_tokens": 2, "completion_tokens": 3, "cost_usd": 0.1}
    rows = [
        {"id": "log-1", "timestamp": str(now - timedelta(days=3)), "status_code": 200, "latency_ms": 7, **use},
        {"id": "log-2", "timestamp": str(now - timedelta(days=3)), "status_code": 500, "latency_ms": 8, **use},
        {
            "id": "17",
            "timestamp": str(now),
            "method": "GET",
            "path": "/x",
            "provider_id": "",
            "metadata_json": '{"k": "v"}',
        },
        {"id": "old", "timestamp": legacy.NOW},
        {"id": "later", "timestamp": "2999-01-01 00:00:00"},
        {"id": "never", "timestamp": "0001-01-01 00:00:00+00:00"},
    ]
    legacy.database(tmp_path / "old.db", {"request_logs": rows}).close()
    for resume in (False, True):
        report = imports.run(dsn, tmp_path / "old.db", resume=resume)
        assert report.equal
        assert [note[3] for note in notes(report)] == [
            "has no time",
            "is older than logging.retention_days (30) allows",
            "is of a time to come",
        ]
        assert sql("SELECT count(*), max(metadata->>'k'), bool_or(id = 17) FROM request_logs") == [(3, "v", True)]
        assert sql("SELECT requests, errors, prompt_tokens, cost_usd::float, latency_ms FROM model_usage") == [
            (2, 1, 4, 0.2, 15.0)
        ]


def test_a_database_from_before_the_later_columns_arrives(tmp_path: Path, dsn: str, sql: Sql) -> None:
    rows = {
        "providers": [{"id": "p", "name": "P", "requires_key": None, "created_at": legacy.NOW}],
        "agents": [{"id": "a", "name": "A", "started_at": legacy.NOW, "last_active": "0001-01-01 00:00:00+00:00"}],
    }
    legacy.database(tmp_path / "old.db", rows, legacy.OLDEST).close()
    report = imports.run(dsn, tmp_path / "old.db")
    assert report.equal
    assert sql("SELECT id, requires_key, is_shared, updated_at = created_at FROM providers") == [
        ("p", False, True, True)
    ]
    assert sql("SELECT id, last_active = started_at FROM agents") == [("a", True)]


def test_a_dump_is_imported_as_the_database_itself(old: Path, dsn: str, sql: Sql, tmp_path: Path) -> None:
    (tmp_path / "dump.sql").write_text(legacy.dump(old))
    report = imports.run(dsn, tmp_path / "dump.sql")
    assert report.equal
    assert {table: counts.written for table, counts in report.counts.items()}["agents"] == 1
    assert sql("SELECT value FROM config WHERE key = 'motto'") == [("plain text",)]


def test_a_dump_cannot_write_another_file(dsn: str, tmp_path: Path) -> None:
    (tmp_path / "dump.sql").write_text(f"ATTACH DATABASE '{tmp_path}/stolen.db' AS x; CREATE TABLE x.t (a);")
    with pytest.raises(SourceError, match="not authorized"):
        imports.run(dsn, tmp_path / "dump.sql")
    assert not (tmp_path / "stolen.db").exists()


def test_a_database_is_read_while_the_original_writes_to_it(tmp_path: Path, dsn: str, sql: Sql) -> None:
    writing = legacy.database(tmp_path / "old.db", legacy.some())
    writing.execute("PRAGMA journal_mode = WAL")
    writing.execute("UPDATE projects SET name = 'In the WAL' WHERE id = 'shop'")
    writing.commit()
    writing.execute("UPDATE projects SET name = 'not committed' WHERE id = 'shop'")
    assert imports.run(dsn, tmp_path / "old.db").equal
    assert sql("SELECT name FROM projects WHERE id = 'shop'") == [("In the WAL",)]
    writing.close()


def test_the_file_is_not_changed(old: Path, dsn: str) -> None:
    before = old.read_bytes()
    old.chmod(0o400)
    imports.run(dsn, old)
    assert old.read_bytes() == before
    assert sorted(path.name for path in old.parent.iterdir()) == [".beads", "old.db"]


def test_a_dry_run_reports_everything_and_writes_nothing(old: Path, dsn: str, sql: Sql) -> None:
    report = imports.run(dsn, old, old.parent / ".beads", dry_run=True)
    assert report.equal
    assert report.counts["beads"].written == 5
    for table in (*imports.TABLES, "events", "imports"):
        assert sql(f"SELECT count(*) FROM {table}") == [(0,)], table


@pytest.mark.parametrize("choice", ["fail", "skip", "replace"])
def test_a_row_that_is_there_and_differs_is_handled_as_chosen(
    choice: str, old: Path, dsn: str, sql: Sql, tmp_path: Path
) -> None:
    sql("INSERT INTO projects (id, name) VALUES ('shop', 'Mine')")
    if choice == "fail":
        with pytest.raises(errors.Conflict, match="project shop"):
            imports.run(dsn, old, on_conflict=choice)
        assert sql("SELECT count(*) FROM agents") == [(0,)], "nothing is written"
        return
    report = imports.run(dsn, old, on_conflict=choice)
    assert report.equal
    counts = report.counts["projects"]
    assert (counts.written, counts.replaced, counts.skipped) == ((1, 0, 1) if choice == "skip" else (1, 1, 0))
    name, version = ("Mine", 1) if choice == "skip" else ("Shop", 2)
    assert sql("SELECT name, version FROM projects WHERE id = 'shop'") == [(name, version)]
    events = sql("SELECT type, version, changes->>'name' FROM events WHERE entity_id = 'shop' ORDER BY place")
    assert events == [("project.created", 1, "Mine"), ("project.imported", 2, "Shop")][:version]


def test_a_replaced_bead_keeps_the_counters_right(old: Path, dsn: str, sql: Sql) -> None:
    sql("INSERT INTO projects (id, name) VALUES ('p', 'p')")
    sql("INSERT INTO beads (id, title, project_id) VALUES ('shop-3', 't', 'p'), ('x', 't', 'p'), ('y', 't', 'p')")
    sql("INSERT INTO beads (id, title, project_id, blocked_by) VALUES ('shop-2', 't', 'p', '{shop-3, x}')")
    sql("INSERT INTO beads (id, title, project_id, blocked_by, parent) VALUES ('shop-1', 't', 'p', '{shop-2}', 'y')")
    imports.run(dsn, old, old.parent / ".beads", on_conflict="replace")
    wrong = """
        SELECT id FROM beads b WHERE open_blockers <> (SELECT count(*) FROM beads o WHERE o.id = ANY (b.blocked_by)
                                                          AND o.status <> 'closed')
            OR open_children <> (SELECT count(*) FROM beads c WHERE c.parent = b.id AND c.status <> 'closed')
            OR blocked_by <> ARRAY(SELECT blocker_id FROM bead_blockers k WHERE k.bead_id = b.id)
        """
    assert sql(wrong) == []
    assert sql("SELECT blocked_by FROM beads WHERE id IN ('shop-1', 'shop-2') ORDER BY id") == [([],), (["shop-3"],)]
    assert sql("SELECT open_children FROM beads WHERE id = 'y'") == [(0,)]


def test_a_second_import_changes_nothing(old: Path, dsn: str, sql: Sql) -> None:
    imports.run(dsn, old, old.parent / ".beads")
    events = sql("SELECT count(*) FROM events")
    report = imports.run(dsn, old, old.parent / ".beads")
    assert sum(counts.written + counts.replaced for counts in report.counts.values()) == 0
    assert sql("SELECT count(*) FROM events") == events


def test_one_transaction_is_refused_while_instances_serve(old: Path, dsn: str, client: AppClient) -> None:
    with pytest.raises(errors.Conflict, match="1 instances are active"):
        imports.run(dsn, old)


def test_a_file_that_is_no_database_is_refused_in_one_line(tmp_path: Path, dsn: str) -> None:
    (tmp_path / "torn.db").write_bytes(b"SQLite format 3\x00" + b"x" * 5000)
    (tmp_path / "text.sql").write_text("Dear diary,\n")
    for name in ("torn.db", "text.sql"):
        run = loom(dsn, "import-sqlite", str(tmp_path / name))
        assert run.returncode == 1
        assert run.stderr.startswith("Error: "), run.stderr
        assert name in run.stderr
        assert "Traceback" not in run.stderr


def test_the_command_writes_a_report_and_ends_with_its_status(old: Path, dsn: str, tmp_path: Path) -> None:
    run = loom(dsn, "import-sqlite", str(old), "--beads", str(old.parent / ".beads"), "--report", f"{tmp_path}/r.json")
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("Done: both sides are equal.\n")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["equal"]
    assert report["tables"]["beads"]["written"] == 5
    assert report["notes"]


def test_a_row_that_postgresql_changes_is_found_by_the_verification(old: Path, dsn: str, sql: Sql) -> None:
    """Planted: a trigger that changes one value on its way into the table."""
    sql(
        """
        CREATE FUNCTION wrong() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.name := upper(NEW.name); RETURN NEW; END';
        CREATE TRIGGER wrong BEFORE INSERT ON agents FOR EACH ROW EXECUTE FUNCTION wrong()
        """
    )
    report = imports.run(dsn, old)
    assert not report.equal
    assert report.verified["agents"].differences == [f"agent {MANAGER}: name"]
    assert sql("SELECT count(*) FROM projects") == [(0,)], "all or nothing"


def test_sqlite_itself_can_read_what_the_tests_make(old: Path) -> None:
    assert sqlite3.connect(old).execute("PRAGMA integrity_check").fetchone() == ("ok",)
