"""The configured database, as `loom psql` finds it."""

from __future__ import annotations

from pathlib import Path

from loom import credentials, embedded
from loom.config import DatabaseConfig


def dsn_of(database: DatabaseConfig) -> str:
    """Its DSN; of the embedded one, which runs from now on while this process lives. Raises ServerError."""
    return credentials.dsn_of(database, database.dsn) if database.dsn else embedded.use(Path(database.folder))
