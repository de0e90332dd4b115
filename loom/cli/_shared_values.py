"""The commands of `loom config` that ask a server: the settings that all instances share."""

from __future__ import annotations

import json

import click

from loom.cli import _remote
from loom.cli._remote import Remote


@click.command()
@_remote.remote
def ls(asked: Remote) -> None:
    """Print the settings in force, and all shared values."""
    asked.print(asked.client.get_config())


@click.command("get")
@click.argument("key")
@_remote.remote
def get_value(asked: Remote, key: str) -> None:
    """Print a shared value. Exit status 3 if there is none."""
    asked.print(asked.client.get_config_value(key))


@click.command("set")
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


@click.command()
@click.argument("key")
@_remote.yes_option
@_remote.remote
def unset(asked: Remote, key: str, yes: bool) -> None:
    """Delete a shared value."""
    _remote.confirm(f"Delete the shared value {key}?", yes)
    asked.client.delete_config_value(key)
    asked.print({"deleted": key}, f"{key} is deleted")


COMMANDS = [ls, get_value, set_value, unset]
