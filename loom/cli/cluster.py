"""`loom cluster`: several instances on this machine."""

from __future__ import annotations

import click

from loom import cluster as running
from loom import config as configuration
from loom import log


@click.command()
@click.option("--instances", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option(
    "--port",
    type=click.IntRange(1, 65435),
    default=8080,
    show_default=True,
    help="Port of the first instance; the others follow.",
)
@click.option("--nginx-port", type=click.IntRange(1, 65535), default=8000, show_default=True)
def cluster(instances: int, port: int, nginx_port: int) -> None:
    """Start several instances, each on its own port, nginx, and the embedded database if no other is configured."""
    if port <= nginx_port < port + instances:
        raise click.BadParameter(f"{nginx_port} is also the port of an instance", param_hint="--nginx-port")

    def say(text: str) -> None:
        click.echo(text, color=None if log.coloured() else False)  # None: only on a terminal

    try:
        running.run(configuration.load(), instances, port, nginx_port, say)
    except running.ClusterError as exc:
        raise click.ClickException(str(exc)) from None
