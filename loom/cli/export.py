"""`loom export`: all shared state in one file."""

from __future__ import annotations

from pathlib import Path

import click

from loom.cli import _transfer
from loom.transfer import export as exporting
from loom.transfer.errors import SourceError


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def export(file: Path) -> None:
    """Write all shared state to FILE: JSON lines in gzip, from one moment. Loom may serve meanwhile."""
    with _transfer.Progress() as progress:
        try:
            rows = exporting.export(_transfer.database(), file, progress.show)
        except SourceError as exc:
            raise click.ClickException(str(exc)) from None
    click.echo(f"{file}: " + ", ".join(f"{n:,} {table}" for table, n in rows.items() if n))
