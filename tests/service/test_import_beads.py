"""`loom import-beads` and `loom export-beads`: for those who come from `bd`, and go back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import imports, legacy
from harness.imports import mapped, notes

from loom.transfer.export_beads import export_beads

Sql = Callable[..., list[tuple[Any, ...]]]
AT = "2026-01-20T08:00:00.5Z"


def issue(name: str, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "title": f"Issue {name}",
        "status": "open",
        "priority": 2,
        "issue_type": "task",
        "created_at": AT,
        "updated_at": AT,
        **more,
    }


def link(of: str, to: str, how: str = "blocks", **more: Any) -> dict[str, Any]:
    return {"issue_id": of, "depends_on_id": to, "type": how, "created_at": AT, "created_by": "steve", **more}


ISSUES = [
    issue("bd-a1", description='Text\nwith "quotes" \\ and 😀', design="D" * 300_000,
          acceptance_criteria="A", notes="N",
          priority=0, issue_type="decision",
          owner="steve@example.com", created_by="steve", labels=["x", "y z"],
          estimated_minutes=90, external_ref="gh-9", metadata={"b": 1.50, "a": [None]}),
    issue("bd-a1.1", dependencies=[link("bd-a1.1", "bd-a1", "parent-child"), link("bd-a1.1", "bd-z")],
          comments=[{"id": 7, "issue_id": "bd-a1.1", "author": "steve", "text": "done?", "created_at": AT}]),
    issue("bd-b", status="closed", closed_at="2026-01-21T08:00:00Z", close_reason="Done", assignee="steve"),
    issue("bd-c", status="tombstone", closed_at="2026-01-21T08:00:00Z", deleted_by="steve"),
    issue("bd-d", status="pinned",
          dependencies=[link("bd-d", "bd-b", "related"), link("bd-d", "bd-a1", "discovered-from")]),
    issue("bd-e", status="in_progress", assignee="steve", dependencies=[link("bd-e", "bd-gone")]),
    issue("bd-f", dependencies=[link("bd-f", "bd-g")]),
    issue("bd-g", dependencies=[link("bd-g", "bd-f")]),
]  # fmt: skip


@pytest.fixture
def issues(tmp_path: Path) -> Path:
    file = tmp_path / "issues.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in ISSUES))
    return file


def exported(dsn: str, tmp_path: Path) -> dict[str, Any]:
    export_beads(dsn, tmp_path / "out.jsonl", None)
    return {issue["id"]: issue for issue in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}


def test_a_round_trip_keeps_every_field_of_bd(issues: Path, dsn: str, tmp_path: Path) -> None:
    assert imports.run(dsn, folder=issues).equal
    assert exported(dsn, tmp_path) == {issue["id"]: issue for issue in ISSUES}


def test_what_changes_in_loom_is_what_bd_gets(issues: Path, dsn: str, tmp_path: Path, sql: Sql) -> None:
    imports.run(dsn, folder=issues)
    sql("UPDATE beads SET blocked_by = '{bd-a1}', status = 'blocked' WHERE id = 'bd-f'")
    sql("UPDATE beads SET blocked_by = '{}' WHERE id = 'bd-a1.1'")
    sql("UPDATE beads SET status = 'closed', close_reason = 'ok' WHERE id = 'bd-e'")
    found = exported(dsn, tmp_path)
    assert (found["bd-f"]["status"], found["bd-e"]["status"]) == ("blocked", "closed")
    assert {"issue_id": "bd-f", "depends_on_id": "bd-a1", "type": "blocks"} in found["bd-f"]["dependencies"]
    assert "bd-g" not in {each["depends_on_id"] for each in found["bd-f"]["dependencies"]}


def test_the_issues_of_bd_can_be_worked_on(issues: Path, dsn: str, sql: Sql) -> None:
    report = imports.run(dsn, folder=issues, default_project="mine")
    assert sql("SELECT id, status, parent, blocked_by, open_children, project_id FROM beads ORDER BY id") == [
        ("bd-a1", "open", None, [], 1, "mine"),
        ("bd-a1.1", "open", "bd-a1", [], 0, "mine"),
        ("bd-b", "closed", None, [], 0, "mine"),
        ("bd-c", "closed", None, [], 0, "mine"),
        ("bd-d", "deferred", None, [], 0, "mine"),
        ("bd-e", "open", None, [], 0, "mine"),
        ("bd-f", "open", None, ["bd-g"], 0, "mine"),
        ("bd-g", "open", None, [], 0, "mine"),
    ]
    assert [note[1:] for note in notes(report) if note[2] == "blocked_by"] == [
        ("issues.jsonl:2", "blocked_by", "there is no such bead"),
        ("issues.jsonl:6", "blocked_by", "there is no such bead"),
        ("issues.jsonl:8", "blocked_by", "would close the cycle bd-f → bd-g → bd-f"),
    ]
    assert mapped(report)["beads.status: tombstone → closed"] == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"title": "no id"}', "has no id"),
        (b'{"id": "a/b"}', "the id has more than 200 characters, a control character or a slash"),
        (b'{"id": "x", "title": "\xff"}', "is not UTF-8"),
        (b'{"id": "x", "id": "y"}', "is not JSON"),
        (b'{"id": "x", "description": "' + b"d" * 2_000_000 + b'"}', "would have 2000"),
        (b'{"id": "x", "description": "' + b"d" * 20_000_000 + b'"}', "has more than 16777216 bytes"),
    ],
)
def test_a_line_that_is_no_issue_is_in_the_report(line: bytes, reason: str, issues: Path, dsn: str, sql: Sql) -> None:
    issues.write_bytes(issues.read_bytes() + line + b"\n" + json.dumps(issue("bd-last")).encode() + b"\n")
    report = imports.run(dsn, folder=issues)
    assert report.equal
    assert sql("SELECT count(*) FROM beads") == [(len(ISSUES) + 1,)]
    assert [note[3][: len(reason)] for note in notes(report) if note[1] == "issues.jsonl:9"] == [reason]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "is not a bead, but a list or a text"),
        ("id: [x\n", "is not YAML in line 2: did not find expected ',' or ']'"),
        ("id: x\ntitle: !!python/object:os.system x\n", "is not YAML in line 2"),
        ("a: &a [1]\nid: x\nb: [*a, *a]\n", "holds an alias: a small file could become a very large bead"),
        ("id: x\ncontext: {a: b}\ncontext: 5\n", "is not YAML in line 1: a key is given twice"),
        ("title: no id\n", "has no id"),
    ],
)
def test_a_file_that_is_no_bead_is_in_the_report(text: str, reason: str, dsn: str, tmp_path: Path) -> None:
    legacy.folder(tmp_path / ".beads", legacy.beads())
    (tmp_path / ".beads/beads/x.yaml").write_text(text)
    report = imports.run(dsn, folder=tmp_path / ".beads")
    assert report.equal
    found = [note[3] for note in notes(report) if note[1] == "beads/x.yaml"]
    assert [note[: len(reason)] for note in found] == [reason]


def test_a_folder_as_the_original_leaves_it_arrives(dsn: str, tmp_path: Path, sql: Sql, seed: int) -> None:
    """Its shape: 230 files in both spellings, links from both ends, duplicates, agents that are gone, a cycle."""
    chance = random.Random(seed)
    names = [f"loom-{n:03}" for n in range(230)]
    beads = []
    for n, name in enumerate(names):
        bead: dict[str, Any] = {
            "id": name,
            "title": f"Bead {n}",
            "status": chance.choice(["open", "closed", "in_progress"]),
        }
        old = n % 2
        bead["projectid" if old else "project_id"] = chance.choice(["loom-self", "", "gone"])
        bead["assignedto" if old else "assigned_to"] = chance.choice(["", "agent-1-Engineer (Default)"])
        bead["blockedby" if old else "blocked_by"] = chance.sample(names[n + 1 :], min(2, 229 - n))
        bead["blocks"] = chance.sample(names[:n], min(1, n))
        bead["createdat" if old else "created_at"] = "2026-01-20T08:00:00.123456789-08:00"
        bead["description"] = "text: with\n  any # character %s\n" * 3
        bead["context"] = {"dispatch_count": "1242", "answer": "x" * (766_000 if n == 7 else 10)}
        beads.append(bead)
    beads[229]["blocks"] = []
    beads[229]["blockedby"] = ["loom-000"]
    folder = legacy.folder(tmp_path / ".beads", beads)
    (folder / "beads/230-again.yaml").write_text((folder / "beads/1.yaml").read_text())
    (folder / "beads/empty.yaml").write_text("")
    report = imports.run(dsn, folder=folder)
    assert report.equal
    counts = report.counts["beads"]
    assert (counts.read, counts.written, counts.left_out) == (232, 230, 2)
    assert sum("would close the cycle" in note[3] for note in notes(report)) >= 1
    assert sql("SELECT octet_length(context->>'answer') FROM beads WHERE id = 'loom-007'") == [(766_000,)]
    dropped = sum(note[2] in ("blocked_by", "blocks") for note in notes(report))
    said = {(name, other) for name, bead in zip(names, beads, strict=True)
            for other in bead.get("blockedby", bead.get("blocked_by"))}  # fmt: skip
    said |= {(other, name) for name, bead in zip(names, beads, strict=True) for other in bead["blocks"]}
    assert sql("SELECT count(*) FROM bead_blockers")[0][0] >= len(said) - dropped
    assert sql(
        "SELECT count(DISTINCT b) FROM beads, unnest(blocked_by) AS b WHERE b NOT IN (SELECT id FROM beads)"
    ) == [(0,)]
