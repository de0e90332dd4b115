"""Runs imports as the command does, and tells what came of them."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

from loom.transfer import beads, importing, sqlite
from loom.transfer.importing import Options
from loom.transfer.report import Report

TABLES = ("providers", "projects", "agents", "config", "beads", "comments", "bead_blockers")


def run(dsn: str, database: Path | None = None, folder: Path | None = None, **options: Any) -> Report:
    """Import a database, a folder of beads, or both."""

    def read(report: Report) -> importing.Source:
        rows = sqlite.read(database, report) if database else ()
        return itertools.chain(rows, beads.read(folder, report) if folder else ())

    source = " ".join(str(path) for path in (database, folder) if path)
    return importing.run(dsn, source, read, Options(**options))


def as_json(report: Report) -> dict[str, Any]:
    """The report as `--report` writes it."""
    text = io.StringIO()
    report.write(text)
    return json.loads(text.getvalue())


def notes(report: Report) -> list[tuple[str, str, str, str]]:
    return [(note["table"], note["row"], note["column"], note["reason"]) for note in report.each_note()]


def mapped(report: Report) -> dict[str, int]:
    return {f"{table}.{column}: {change}": times for (table, column, change), times in report.mapped.items()}
