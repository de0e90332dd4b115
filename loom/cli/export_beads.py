"""`loom export-beads`: beads for those who use `bd`."""

from __future__ import annotations

from pathlib import Path

import click

from loom.cli import _transfer
from loom.transfer import export_beads as exporting
from loom.transfer.errors import SourceError


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--project", help="Only the beads of this project.")
def export_beads(file: Path, project: str | None) -> None:
    """Write the beads to FILE as an issues.jsonl of bd."""
    try:
        count = exporting.export_beads(_transfer.database(), file, project)
    except SourceError as exc:
        raise click.ClickException(str(exc)) from None
    click.echo(f"{file}: {count:,} beads")
