"""What the commands that import have in common."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from loom import config, db
from loom.cli._database import dsn_of
from loom.transfer import importing
from loom.transfer.errors import SourceError
from loom.transfer.importing import Options
from loom.transfer.report import Report
from loom.transfer.stage import Source

SECONDS_BETWEEN_LINES = 5.0


def options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of an import."""
    for option in (
        click.option("--report", type=click.Path(dir_okay=False), help="Write the whole report to this file, as JSON."),
        click.option("--project", default="imported", show_default=True, help="The project of beads that name none."),
        click.option(
            "--resume", is_flag=True, help="Write in small batches that each commit; continues such an import."
        ),
        click.option(
            "--on-conflict",
            type=click.Choice(["fail", "skip", "replace"]),
            default="fail",
            show_default=True,
            help="What to do about a row that is there already, and differs.",
        ),
        click.option("--dry-run", is_flag=True, help="Do everything, then roll it back."),
    ):
        command = option(command)
    return command


def database() -> str:
    """The DSN of the configured database, with its schema applied."""
    settings = config.load().database
    dsn = dsn_of(settings)
    db.migrate(dsn)
    return dsn


def run(source: str, read: Callable[[Report], Source], report: str | None, **given: Any) -> None:
    """Imports, prints the report, and ends with 1 if both sides differ."""
    log_days = config.load().logging.retention_days
    chosen = Options(given["on_conflict"], given["dry_run"], given["resume"], given["project"], log_days)
    with Progress() as progress:
        try:
            done = importing.run(database(), source, read, chosen, progress.show)
        except SourceError as exc:
            raise click.ClickException(str(exc)) from None
    for line in done.lines():
        click.echo(line)
    if report is not None:
        with Path(report).open("w", encoding="utf-8") as file:
            done.write(file)
    if not done.equal:
        raise click.ClickException(
            "Both sides differ: nothing is written." if not chosen.resume else "Both sides differ."
        )
    click.echo("Nothing is written: --dry-run." if chosen.dry_run else "Done: both sides are equal.")


class Progress:
    """A bar on a terminal, with the rate and the time that is left; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what, self._began, self._line = "", time.monotonic(), time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def show(self, done: int, total: int, what: str) -> None:
        if what != self._what:
            self._end()
            self._what, self._began = what, time.monotonic()
            if total and sys.stderr.isatty():
                self._bar = click.progressbar(
                    length=total, label=what, file=sys.stderr, item_show_func=lambda rate: rate
                )
        rate = f"{int(done / max(time.monotonic() - self._began, 0.001)):,} rows/s"
        if self._bar is not None:
            self._bar.update(done - self._bar.pos, rate)
        elif time.monotonic() - self._line > SECONDS_BETWEEN_LINES:
            self._line = time.monotonic()
            click.echo(f"{what}: {done:,}{f' of {total:,}' if total else ''} rows, {rate}", err=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.render_finish()
            self._bar = None
