"""`loom cluster`: several instances on this machine."""

from __future__ import annotations

import click

from loom import cluster as running
from loom import config as configuration


@click.command()
@click.option("--instances", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--port", type=click.IntRange(1, 65435), default=8080, show_default=True, help="Of the first instance.")
@click.option("--nginx-port", type=click.IntRange(1, 65535), default=8000, show_default=True)
def cluster(instances: int, port: int, nginx_port: int) -> None:
    """Start the database if none is configured, instances on ports of their own, and nginx in front of them."""
    if port <= nginx_port < port + instances:
        raise click.BadParameter(f"{nginx_port} is an instance's port, too", param_hint="--nginx-port")
    try:
        running.run(configuration.load(), instances, port, nginx_port, click.echo)
    except running.ClusterError as exc:
        raise click.ClickException(str(exc)) from None
