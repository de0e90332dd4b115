"""`loom status`: the cluster at a glance."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click
import msgspec
from rich.console import Group
from rich.live import Live
from rich.text import Text

from loom import config as configuration
from loom import db, errors
from loom.cli import _terminal as terminal
from loom.cli._database import dsn_of
from loom.overview import Overview, read, shown, span

PERIOD = 2.0  # seconds between two looks of --watch


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, one line for each look.")
@click.option("--watch", is_flag=True, help="Look again every 2 s, until Ctrl-C.")
def status(as_json: bool, watch: bool) -> None:
    """Show the health of the cluster, instances, locks, beads, and the leases that end next.

    It asks the database, so it works while no instance runs. The exit status is 1 if something is wrong.
    """
    settings = configuration.load().database
    dsn = dsn_of(settings)

    def look() -> Overview:
        with db.session(dsn, "loom status", settings.timeout) as conn:
            return read(conn)

    if watch:
        _watch(look, as_json)
    else:
        seen = look()
        _print(seen, as_json)
        sys.exit(not seen.healthy)


def _print(seen: Overview, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(seen))
    else:
        terminal.console().print(_drawn(seen))


def _watch(look: Callable[[], Overview], as_json: bool) -> None:
    """Look until Ctrl-C; a database that is away may come back."""
    console = terminal.console()
    live = Live(console=console, screen=True, auto_refresh=False) if console.is_terminal and not as_json else None
    try:
        if live:
            live.start()
        while True:
            try:
                seen = look()
                if live:
                    live.update(_drawn(seen), refresh=True)
                else:
                    _print(seen, as_json)
            except errors.Error as exc:
                if live:
                    live.update(Text(str(exc), "bold red"), refresh=True)
                elif as_json:
                    click.echo(msgspec.json.encode({"healthy": False, "summary": str(exc)}))
                else:
                    click.echo(str(exc))
            time.sleep(PERIOD)
    except KeyboardInterrupt:
        pass
    finally:
        if live:
            live.stop()


def _drawn(seen: Overview) -> Group:
    instances = (
        (
            f"{row.hostname}:{row.metadata.get('port', '?')}",
            Text(row.status, "" if row.status == "active" else "yellow" if row.status == "draining" else "bold red"),
            f"{row.heartbeat_age_seconds:.0f} s ago",
            row.metadata.get("version", ""),
            row.instance_id,
        )
        for row in seen.instances
    )
    locks = (
        (
            row["lock_name"],
            row["owner"],
            row["fencing_token"],
            f"{row['acquired_at']:%Y-%m-%d %H:%M:%SZ}",
            span(row["seconds_left"]),
            row["waiting"] or "",
        )
        for row in seen.locks
    )
    leases = (
        (row["id"], row["assigned_to"], _end_of(row["seconds_left"]), row["attempts"] or "") for row in seen.leases
    )
    more = f", of {shown(seen.locks_held)}" if seen.locks_held > len(seen.locks) else ""
    return Group(
        Text(seen.summary, "bold green" if seen.healthy else "bold red"),
        *terminal.table("Instances", ["address", "status", "heartbeat", "version", "instance id"], instances),
        *terminal.table(f"Locks{more}", ["name", "owner", ">token", "acquired", ">ends in", ">waiting"], locks),
        *terminal.table("Beads", [f">{name}" for name in seen.beads], [map(shown, seen.beads.values())]),
        *terminal.table("Leases that end next", ["bead", "agent", ">ends", ">attempts"], leases),
    )


def _end_of(seconds_left: float) -> Text:
    if seconds_left <= 0:
        return Text(f"{span(-seconds_left)} ago", "bold red")
    return Text(f"in {span(seconds_left)}", "yellow" if seconds_left < 60 else "")
