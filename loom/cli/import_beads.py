"""`loom import-beads`: the beads of a folder, or those of `bd`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loom.cli import _transfer
from loom.transfer import beads


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@_transfer.options
def import_beads(source: Path, **options: Any) -> None:
    """Import the beads of SOURCE: a folder .beads with YAML files and issues.jsonl, or an issues.jsonl of bd."""
    _transfer.run(str(source), lambda report: beads.read(source, report), **options)
