"""`loom health`: for the health check of a container, which has no curl."""

from __future__ import annotations

import http.client

import click

from loom import config
from loom.cluster import reachable

SECONDS = 7  # above the 5 within which /health answers without a database


@click.command()
def health() -> None:
    """Print what the instance on the configured port answers to GET /health; status 1 unless it is healthy."""
    server = config.load().server
    connection = http.client.HTTPConnection(reachable(server.host), server.http_port, timeout=SECONDS)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        click.echo(answer.read(), nl=False)
    except (OSError, http.client.HTTPException) as exc:
        raise click.ClickException(f"port {server.http_port} on {server.host} does not answer: {exc}") from None
    finally:
        connection.close()
    raise SystemExit(answer.status != 200)
