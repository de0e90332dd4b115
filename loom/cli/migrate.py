"""`loom migrate`: applies the schema before the first start or an upgrade."""

from __future__ import annotations

import click

from loom import config, db
from loom.cli._database import dsn_of


@click.command()
def migrate() -> None:
    """Apply schema.sql to the configured database; changes nothing if it is already applied."""
    version = db.migrate(dsn_of(config.load().database))
    click.echo(f"schema version {version}")
