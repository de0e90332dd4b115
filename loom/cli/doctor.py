"""`loom doctor`: what is wrong with the deployment, and what mends it."""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

import click
import msgspec
from rich.text import Text

from loom import config as configuration
from loom.cli import _terminal as terminal
from loom.doctor import Finding, examine

STYLES = {"ok": "green", "wrong": "bold red", "unchecked": "dim"}


def _address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).hostname):
        raise click.BadParameter("expected http://HOST or https://HOST")
    return value


@click.command()
@click.option("--url", callback=_address, help="The address of nginx, such as http://localhost:8000.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(url: str | None, as_json: bool) -> None:
    """Check the settings, the database, the instances and what stands around them; nothing is changed.

    Each check is ok, wrong (then with what mends it), or unchecked, because it cannot be made here. The exit status is
    1 if something is wrong.
    """
    try:
        findings = examine(configuration.load(), url)
    except configuration.ConfigError as exc:
        findings = [Finding("wrong", str(exc), "correct it; loom config check", "settings")]
    faults = [finding for finding in findings if finding.state == "wrong"]
    if as_json:
        click.echo(msgspec.json.encode({"healthy": not faults, "checks": findings}))
    else:
        console = terminal.console()
        for finding in findings:
            console.print(
                Text.assemble(
                    (f"{finding.state:<9} ", STYLES[finding.state]), (f"{finding.check:<15}", "bold"), finding.text
                ),
                soft_wrap=True,
            )
            if finding.remedy:
                console.print(Text.assemble(" " * 10, ("to mend it:    ", "bold"), finding.remedy), soft_wrap=True)
        console.print(Text(f"\n{len(faults)} of {len(findings)} checks found a fault.", "bold red") if faults else "")
    sys.exit(bool(faults))
