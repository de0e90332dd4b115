"""The `loom` command. Each module here is the command of the same name, imported only when it is called.

A module whose name begins with _ is no command: the commands share it. `import-sqlite` is in import_sqlite.py, and
`import`, a word of Python's own, in import_.py.
"""

from __future__ import annotations

import importlib
import keyword
import pkgutil
from typing import Any

import click

import loom
from loom.config import ConfigError, mask
from loom.embedded import ServerError
from loom.errors import Error, SchemaError
from loom.ports import PortError


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        names = (module.name for module in pkgutil.iter_modules(__path__))
        return sorted(name.strip("_").replace("_", "-") for name in names if not name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        name = cmd_name.replace("-", "_") + ("_" if keyword.iskeyword(cmd_name) else "")
        return getattr(importlib.import_module(f"loom.cli.{name}"), name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error that a user can fix is one line, with exit status 1."""
        try:
            return super().invoke(ctx)
        except (ConfigError, Error, PortError, SchemaError, ServerError) as exc:
            raise click.ClickException(mask(" ".join(str(exc).split()))) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(loom.__version__, prog_name="loom")
def main() -> None:
    """Locks, instances and shared state for many AI agents, on nothing but PostgreSQL."""
