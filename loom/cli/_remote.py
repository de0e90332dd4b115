"""What the commands share that ask a server: its address, output for people and programs, and exit statuses."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from loom.cli import _terminal as terminal
from loom.client import Client, errors

# The exit statuses are documented in docs/cli.md, and stable.
FAILED, NOT_FOUND, CONFLICT, NOTHING, UNAVAILABLE, NOT_ACQUIRED, LOST = 1, 3, 4, 5, 69, 75, 70
STATUS: dict[type[errors.Error], int] = {
    errors.NotFound: NOT_FOUND,
    errors.Conflict: CONFLICT,
    errors.Stale: CONFLICT,
    errors.Unavailable: UNAVAILABLE,
    errors.Unreachable: UNAVAILABLE,
}
F = TypeVar("F", bound=Callable[..., Any])


class Remote:
    """A server, and how to print what it answers."""

    def __init__(self, server: str, api_key: str | None, as_json: bool) -> None:
        self.client, self.as_json = Client(server, api_key=api_key, timeout=8.0), as_json

    def print(self, value: Any, text: str | None = None) -> None:
        """The value as JSON, or for people the text, or the members of an object, one a line."""
        if self.as_json:
            click.echo(json.dumps(value, default=plain, ensure_ascii=False))
        elif text is not None:
            click.echo(text)
        else:
            members = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            rows = [(name, _cell(member)) for name, member in members.items() if member not in (None, [], {}, "")]
            for part in terminal.table("", ("name", "value"), rows)[1:]:
                terminal.console().print(part)

    def print_rows(self, title: str, rows: Iterable[Any], columns: Sequence[str]) -> None:
        """A JSON array, or a table of these members."""
        found = list(rows)
        if self.as_json:
            click.echo(json.dumps(found, default=plain, ensure_ascii=False))
            return
        shown = [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row for row in found]
        cells = [[_cell(row.get(column.lstrip(">"))) for column in columns] for row in shown]
        for part in terminal.table(title, columns, cells):
            terminal.console().print(part)


def plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    return asdict(value)


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return json.dumps(value, ensure_ascii=False, default=plain) if isinstance(value, dict) else str(value or "")


def remote(function: F) -> Callable[..., Any]:
    """Gives a command its Remote as first argument, and its options. An error is one line on standard error."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON alone on standard output.")
    @click.option("--api-key", envvar="LOOM_API_KEY", help="By default that of LOOM_API_KEY.")
    @click.option(
        "--server",
        envvar="LOOM_SERVER",
        default="http://localhost:8080",
        show_default=True,
        help="URLs of nginx or of instances, separated by commas; by default that of LOOM_SERVER.",
    )
    @functools.wraps(function)
    def command(*args: Any, server: str, api_key: str | None, as_json: bool, **options: Any) -> Any:
        try:
            asked = Remote(server, api_key, as_json)
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint="--server") from None
        try:
            return function(asked, *args, **options)
        except errors.Error as exc:
            click.echo(f"Error: {exc}{_advice(exc)}", err=True)
            sys.exit(status_of(exc))

    return command


def status_of(exc: errors.Error) -> int:
    return next((status for kind, status in STATUS.items() if isinstance(exc, kind)), FAILED)


def _advice(exc: errors.Error) -> str:
    if isinstance(exc, errors.Unreachable):
        return ". Is Loom running there? LOOM_SERVER or --server name another address."
    holder = exc.members.get("holder") if isinstance(exc, errors.Problem) else None
    if not holder:
        return ""
    end = holder.get("expires_at") or holder.get("lease_expires_at")
    return f" Holder: {holder.get('owner') or holder.get('agent_id')}, until {end}."


def confirm(question: str, yes: bool) -> None:
    """Ask before what cannot be undone. Without a terminal, --yes is needed."""
    if not yes:
        click.confirm(question, abort=True, err=True)


yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def ids(find: Callable[[Client], Iterable[str]]) -> Callable[..., list[CompletionItem]]:
    """Completes an argument with what the server has; with nothing if it does not answer within a second."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        try:
            server = ctx.params.get("server") or "http://localhost:8080"
            client = Client(server, api_key=ctx.params.get("api_key"), timeout=1.0, attempt_timeout=1.0)
            return [CompletionItem(name) for name in find(client) if name.startswith(incomplete)][:200]
        except Exception:  # a shell shows what a completion prints
            return []

    return complete


lock_names = ids(lambda client: (grant.lock_name for grant in client.list_locks()))
bead_ids = ids(lambda client: (bead["id"] for bead in client.beads.list(status="open,in_progress,blocked,deferred")))
agent_ids = ids(lambda client: (agent["id"] for agent in client.agents.list()))
