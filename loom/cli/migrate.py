"""`loom migrate`: applies the schema before the first start or an upgrade."""

from __future__ import annotations

from pathlib import Path

import click

from loom import config, db, embedded


@click.command()
def migrate() -> None:
    """Apply schema.sql to the configured database; changes nothing if it is already applied."""
    database = config.load().database
    version = db.migrate(database.dsn or embedded.use(Path(database.folder)))
    click.echo(f"schema version {version}")
