"""The configured database, as `loom psql` finds it."""

from __future__ import annotations

from pathlib import Path

from loom import embedded
from loom.config import DatabaseConfig


def dsn_of(database: DatabaseConfig) -> str:
    """Its DSN; of the embedded one, which runs from now on while this process lives. Raises ServerError."""
    return database.dsn or embedded.use(Path(database.folder))
