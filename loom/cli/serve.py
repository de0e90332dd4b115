"""`loom serve`: one instance."""

from __future__ import annotations

import os
import sys

import click

from loom import config


@click.command()
def serve() -> None:
    """Start one instance on the configured port (PORT), until SIGTERM or Ctrl-C."""
    # The factory, not app:app: another app.py may lie where the user stands, and gunicorn looks there first.
    gunicorn = ["-m", "gunicorn", "-c", str(config.resource("gunicorn.conf.py")), "loom.routes:create_app()"]
    os.execv(sys.executable, [sys.executable, *gunicorn])
