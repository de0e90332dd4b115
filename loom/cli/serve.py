"""`loom serve`: one instance."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from loom import config as configuration
from loom import embedded, log


@click.command()
def serve() -> None:
    """Start one instance on the configured port (PORT), until SIGTERM or Ctrl-C."""
    config = configuration.load()
    log.setup(config.logging)
    handed_on = {}
    if config.database.type == "embedded":
        dsn = embedded.use(Path(config.database.folder))
        handed_on = {"DATABASE_TYPE": "postgres", "DATABASE_DSN": dsn}
    # The factory, not app:app: another app.py may lie where the user stands, and gunicorn looks there first.
    gunicorn = ["-m", "gunicorn", "-c", str(configuration.resource("gunicorn.conf.py")), "loom.http:create_app()"]
    os.execve(sys.executable, [sys.executable, *gunicorn], configuration.environment(**handed_on))
