"""`loom serve`: one instance."""

from __future__ import annotations

import os
import sys

import click

from loom import config


@click.command()
def serve() -> None:
    """Start one instance on the configured port (PORT), until SIGTERM or Ctrl-C."""
    # Not app:app: gunicorn looks first in the current folder, which may contain another app.py.
    gunicorn = ["-m", "gunicorn", "-c", str(config.resource("gunicorn.conf.py")), "loom.routes:create_app()"]
    os.execv(sys.executable, [sys.executable, *gunicorn])
