"""The DSN for a new connection: its password may change while Loom runs, so its file or command is asked each time."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import psycopg2
from psycopg2.extensions import make_dsn

from loom.config import DatabaseConfig
from loom.dsn import take_pool

COMMAND_SECONDS = 10


def dsn_of(database: DatabaseConfig, dsn: str) -> str:
    """`dsn`: as it was when the settings were read. Raises psycopg2.OperationalError, whose text has no secret."""
    if database.dsn_file:
        try:
            dsn, _ = take_pool(Path(database.dsn_file).read_text().strip())
        except (OSError, ValueError) as exc:
            raise psycopg2.OperationalError(f"database.dsn_file: {type(exc).__name__}") from None
    if database.password_command:
        return make_dsn(dsn, password=_password(database.password_command))
    return dsn


def _password(command: str) -> str:
    try:
        run = subprocess.run(
            shlex.split(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it may show the secret
            timeout=COMMAND_SECONDS,
            text=True,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as exc:
        raise psycopg2.OperationalError(f"database.password_command: {type(exc).__name__}") from None
    return run.stdout.strip()
