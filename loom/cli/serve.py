"""`loom serve`: one instance."""

from __future__ import annotations

import os
import sys

import click

from loom import config, ports

# A worker whose master was killed holds the port for another 2.4 s.
WAIT_SECONDS = 3


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="The port to listen on; overrides PORT and config.yaml.")
def serve(port: int | None) -> None:
    """Start one instance on the configured port, until SIGTERM or Ctrl-C."""
    environment = config.environment(**({} if port is None else {"PORT": str(port)}))
    server = config.load(environ=environment).server
    ports.check_free(server.host, server.http_port, "Choose another: loom serve --port 18080.", WAIT_SECONDS)
    gunicorn = ["-m", "gunicorn", "-c", str(config.resource("gunicorn.conf.py"))]
    os.execve(sys.executable, [sys.executable, *gunicorn], environment)
