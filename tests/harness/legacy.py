"""Databases and bead folders as the original Loom leaves them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

NOW = "2026-01-20 08:00:00.123456789-08:00"  # as Go's driver writes it; in UTC it is 16:00:00.123456
TABLES = {
    "config_kv": "key TEXT PRIMARY KEY, value TEXT, updated_at DATETIME",
    "providers": """id TEXT PRIMARY KEY, name TEXT, type TEXT, endpoint TEXT, model TEXT, configured_model TEXT,
        selected_model TEXT, selection_reason TEXT, model_score REAL, selected_gpu TEXT, gpu_constraints_json TEXT,
        description TEXT, requires_key BOOLEAN, key_id TEXT, owner_id TEXT, is_shared BOOLEAN, status TEXT,
        last_heartbeat_at DATETIME, last_heartbeat_latency_ms INTEGER, last_heartbeat_error TEXT, metrics_json TEXT,
        schema_version TEXT, attributes_json TEXT, cost_per_mtoken REAL, context_window INTEGER,
        supports_function BOOLEAN, supports_vision BOOLEAN, supports_streaming BOOLEAN, tags_json TEXT,
        created_at DATETIME, updated_at DATETIME""",
    "projects": """id TEXT PRIMARY KEY, name TEXT, git_repo TEXT, branch TEXT, beads_path TEXT, parent_id TEXT,
        is_perpetual BOOLEAN, is_sticky BOOLEAN, git_strategy TEXT, status TEXT, context_json TEXT,
        schema_version TEXT, attributes_json TEXT, closed_at DATETIME, due_date DATETIME, created_at DATETIME,
        updated_at DATETIME""",
    "agents": """id TEXT PRIMARY KEY, name TEXT, role TEXT, provider_id TEXT, position_id TEXT, persona_name TEXT,
        status TEXT, current_bead TEXT, project_id TEXT, schema_version TEXT, attributes_json TEXT,
        started_at DATETIME, last_active DATETIME""",
    "bead_comments": """id TEXT PRIMARY KEY, bead_id TEXT, parent_id TEXT, author_id TEXT, author_username TEXT,
        content TEXT, created_at DATETIME, updated_at DATETIME, edited BOOLEAN, deleted BOOLEAN""",
    "request_logs": """id TEXT PRIMARY KEY, timestamp DATETIME, user_id TEXT, method TEXT, path TEXT, provider_id TEXT,
        model_name TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, total_tokens INTEGER, latency_ms INTEGER,
        status_code INTEGER, cost_usd REAL, error_message TEXT, request_body TEXT, response_body TEXT,
        metadata_json TEXT, created_at DATETIME""",
    "users": "id TEXT PRIMARY KEY, username TEXT, password_hash TEXT",
}
OLDEST = {  # before the columns that later versions added
    "config_kv": TABLES["config_kv"],
    "providers": """id TEXT PRIMARY KEY, name TEXT, type TEXT, endpoint TEXT, description TEXT, requires_key BOOLEAN,
        key_id TEXT, status TEXT, created_at DATETIME, updated_at DATETIME""",
    "projects": """id TEXT PRIMARY KEY, name TEXT, git_repo TEXT, branch TEXT, beads_path TEXT, created_at DATETIME,
        updated_at DATETIME""",
    "agents": """id TEXT PRIMARY KEY, name TEXT, persona_name TEXT, status TEXT, current_bead TEXT, project_id TEXT,
        started_at DATETIME, last_active DATETIME""",
}


def database(
    file: Path, rows: Mapping[str, Iterable[Mapping[str, Any]]], tables: Mapping[str, str] = TABLES
) -> sqlite3.Connection:
    """Make a database with these rows, and return the connection that wrote it."""
    conn = sqlite3.connect(file)
    for name, columns in tables.items():
        conn.execute(f"CREATE TABLE {name} ({columns})")
    for table, records in rows.items():
        for record in records:
            names, marks = ", ".join(record), ", ".join("?" * len(record))
            conn.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(record.values()))
    conn.commit()
    return conn


def dump(file: Path) -> str:
    """What `sqlite3 FILE .dump` prints."""
    conn = sqlite3.connect(file)
    try:
        return "\n".join(conn.iterdump())
    finally:
        conn.close()


def some() -> dict[str, list[dict[str, Any]]]:
    """A small database with a row of each table."""
    times = {"created_at": NOW, "updated_at": "2026-01-21T08:00:00Z"}
    return {
        "providers": [{"id": "local", "name": "Local", "type": "openai", "endpoint": "http://llm:9000/v1", "status":
                       "healthy", "requires_key": 1, "tags_json": '["fast", "a,b", "\\"q\\""]', "model_score": 0.25,
                       "attributes_json": '{"a": [1, 2.50, {"b": null}]}', "schema_version": "1.0", **times}],
        "projects": [
            {"id": "shop-web", "name": "Web", "parent_id": "shop", "status": "closed", "is_sticky": 1, **times},
            {"id": "shop", "name": "Shop", "git_repo": "git@example.com:shop.git", "context_json": '{"k": "v"}',
             "due_date": "0001-01-01 00:00:00+00:00", **times},
        ],
        "agents": [{"id": "agent-1769932530-Engineering Manager (Default)", "name": "Manager", "role": "Manager",
                    "provider_id": "local", "status": "working", "project_id": "shop", "persona_name": "default/em",
                    "started_at": "2026-01-20 08:00:00.123456789 -0800 PST m=+0.012", "last_active": NOW}],
        "config_kv": [{"key": "theme", "value": '{"dark": true}', "updated_at": NOW},
                      {"key": "motto", "value": "plain text", "updated_at": NOW}],
        "bead_comments": [{"id": "c1", "bead_id": "shop-1", "author_id": "u1", "author_username": "ann",
                           "content": "first", "created_at": NOW, "updated_at": NOW, "edited": 0, "deleted": 0},
                          {"id": "c2", "bead_id": "shop-1", "parent_id": "c1", "content": "reply", "created_at": NOW}],
        "users": [{"id": "u1", "username": "ann", "password_hash": "x"}],
    }  # fmt: skip


def beads() -> list[dict[str, Any]]:
    """Beads in both spellings of keys, with links from both ends, a cycle, and an assignee that is gone."""
    return [
        {"id": "shop-1", "title": "One", "status": "cancelled", "projectid": "shop", "blocks": ["shop-4"],
         "createdat": "2026-01-20T08:00:00.5Z", "closedat": "2026-01-22T08:00:00Z", "parent": "", "blockedby": []},
        {"id": "shop-2", "title": "Two", "status": "open", "project_id": "shop", "blocked_by": ["shop-3"],
         "children": ["shop-3"], "created_at": "2026-01-20T08:00:00Z"},
        {"id": "shop-3", "title": "Three", "status": "in_progress", "projectid": "shop", "blockedby": ["shop-2"],
         "assignedto": "ghost", "createdat": "2026-01-20T08:00:00Z"},
        {"id": "shop-4", "title": "Four", "status": "in_progress", "projectid": "", "assignedto": "Manager",
         "createdat": "2026-01-20T08:00:00Z", "context": {"dispatch_count": "1242"}},
        {"id": "bd-1000", "title": "Five", "status": "open", "projectid": "shop", "priority": 0, "type": "bug",
         "createdat": "2026-01-20T08:00:00Z", "entitymetadata": {"schemaversion": "1.0", "attributes": {"k": 1}}},
    ]  # fmt: skip


def folder(at: Path, beads: Iterable[Mapping[str, Any]]) -> Path:
    """A folder of beads, as Go's YAML writes them: one file each."""
    (at / "beads").mkdir(parents=True, exist_ok=True)
    for number, bead in enumerate(beads, 1):
        text = yaml.safe_dump(dict(bead), sort_keys=False, allow_unicode=True)
        (at / "beads" / f"{number}.yaml").write_text(text)
    return at
