"""`loom import-sqlite`: the original's database, with its beads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click

from loom.cli import _transfer
from loom.transfer import beads, sqlite
from loom.transfer.report import Report
from loom.transfer.stage import Source


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--beads", "folder", type=click.Path(exists=True, path_type=Path), help="The folder .beads, too.")
@_transfer.options
def import_sqlite(file: Path, folder: Path | None, **options: Any) -> None:
    """Import FILE, a SQLite database of the original Loom, or the text that .dump makes of it.

    All or nothing, unless --resume is given. The file is only read.
    """

    def read(report: Report) -> Source:
        more = beads.read(folder, report) if folder else ()
        return itertools.chain(sqlite.read(file, report), more)

    _transfer.run(" ".join(map(str, filter(None, (file, folder)))), read, **options)
