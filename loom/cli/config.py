"""`loom config`: the settings, and where each comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from loom.cli import _remote
from loom.cli._remote import Remote
from loom.config import load, mask


@click.group()
def config() -> None:
    """See the configuration, and the settings that all instances share."""


@config.command()
def check() -> None:
    """Print the effective configuration, passwords masked, with the source of each value."""
    settings = load()
    values = asdict(settings)
    values.pop("sources")
    for line in _lines(values, settings.sources):
        click.echo(line)


def _lines(values: Mapping[str, Any], sources: Mapping[str, str], section: str = "") -> list[str]:
    lines = []
    indent = "  " * section.count(".")
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, sources, f"{section}{name}.")]
        else:
            shown = json.dumps(mask(value) if isinstance(value, str) else value, ensure_ascii=False)
            lines.append(f"{f'{indent}{name}: {shown}':<40}  # {sources[section + name]}")
    return lines


@config.command()
@_remote.remote
def ls(asked: Remote) -> None:
    """Print the settings in force, and all shared values."""
    asked.print(asked.client.get_config())


@config.command("get")
@click.argument("key")
@_remote.remote
def get_value(asked: Remote, key: str) -> None:
    """Print a shared value. Exit status 3 if there is none."""
    asked.print(asked.client.get_config_value(key))


@config.command("set")
@click.argument("key")
@click.argument("value")
@_remote.remote
def set_value(asked: Remote, key: str, value: str) -> None:
    """Share a value with all instances: JSON, or else text."""
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    asked.print(asked.client.put_config_value(key, parsed), f"{key} is set")


@config.command()
@click.argument("key")
@_remote.yes_option
@_remote.remote
def unset(asked: Remote, key: str, yes: bool) -> None:
    """Delete a shared value."""
    _remote.confirm(f"Delete the shared value {key}?", yes)
    asked.client.delete_config_value(key)
    asked.print({"deleted": key}, f"{key} is deleted")
