"""`loom import`: the file of `loom export`."""

from __future__ import annotations

from pathlib import Path

import click

from loom.cli import _transfer
from loom.transfer import restore
from loom.transfer.archive import Archive
from loom.transfer.errors import SourceError


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def import_(file: Path) -> None:
    """Put the state of FILE, which `loom export` has written, into an empty database: all or nothing."""
    with _transfer.Progress() as progress:
        try:
            archive = Archive(file)
            restore.restore(_transfer.database(), archive, progress.show)
        except SourceError as exc:
            raise click.ClickException(str(exc)) from None
    click.echo("Done: " + ", ".join(f"{n:,} {table}" for table, n in archive.rows.items() if n))
