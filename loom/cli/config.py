"""`loom config`: the settings, and where each comes from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

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


with contextlib.suppress(ModuleNotFoundError):  # without the extra `client`
    from loom.cli._shared_values import COMMANDS

    for command in COMMANDS:
        config.add_command(command)
