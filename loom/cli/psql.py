"""`loom psql`: psql on the configured database."""

from __future__ import annotations

import os
import shutil

import click
from psycopg2.extensions import make_dsn, parse_dsn

from loom import config as configuration
from loom import embedded
from loom.cli._database import dsn_of


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(arguments: tuple[str, ...]) -> None:
    """Open psql on the configured database; takes psql's own arguments."""
    database = configuration.load().database
    dsn = dsn_of(database)
    # The embedded psql has no TLS.
    program = (shutil.which("psql") if database.dsn else None) or str(embedded.binaries() / "psql")
    connection = parse_dsn(dsn)
    secret = (
        {"PGPASSWORD": connection.pop("password")} if "password" in connection else {}
    )  # other users can read a process's arguments
    os.execve(program, [program, make_dsn(**connection), *arguments], configuration.environment(**secret))
