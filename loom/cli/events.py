"""`loom events`: the feed of changes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click

from loom.cli._remote import Remote, plain, remote
from loom.client import Event


@click.command()
@click.option("--follow", is_flag=True, help="Wait for further events, over restarts of the servers.")
@click.option("--after", type=click.IntRange(0), help="Begin after this cursor; 0 is the oldest event that is kept.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Of the latest events.")
@click.option("--type", "kind", help="Such as bead.created.")
@click.option("--entity")
@click.option("--project")
@remote
def events(
    asked: Remote,
    follow: bool,
    after: int | None,
    limit: int,
    kind: str | None,
    entity: str | None,
    project: str | None,
) -> None:
    """Print changes, oldest first: the latest ones, or those after a cursor. With --json, one line for each."""
    wanted: dict[str, Any] = {"type": kind, "entity_id": entity, "project_id": project}
    page = asked.client.read_events(after, limit=limit if after is None else 1000, **wanted)
    _print(asked, page.events)
    if follow:
        for event in asked.client.events(page.next, **wanted):
            _print(asked, [event])


def _print(asked: Remote, found: Iterable[Event]) -> None:
    for event in found:
        if asked.as_json:
            click.echo(json.dumps(plain(event), default=plain, ensure_ascii=False))
        else:
            changes = json.dumps(event.changes, ensure_ascii=False)
            shown = changes if len(changes) <= 100 else changes[:99] + "…"
            click.echo(f"{event.timestamp:%H:%M:%S}  {event.type:<20} {event.entity_id}  {event.actor}  {shown}")
