"""The settings that are in force. A gunicorn master reads them for all its workers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from flask import current_app

from loom import embedded, instances
from loom import log as logs
from loom.config import Config, ConfigError, load

log = logging.getLogger("loom.settings")


class Read(NamedTuple):
    settings: Config
    logging: dict[str, Any]  # for logging.config.dictConfig
    dsn: str  # also of an embedded server


_read: Read | None = None  # by this process's gunicorn master; its workers inherit it


def read() -> Read:
    """In a gunicorn master: read the settings, open the log and the embedded database.

    gunicorn calls it (through gunicorn.conf.py) at its start and at SIGHUP. A fault prevents the start; at SIGHUP it is
    logged, and what was read before stays in force.
    """
    global _read
    try:
        settings = load()
        handlers = logs.setup(settings.logging)
        database = settings.database
        # The workers inherit the master's share of the folder.
        dsn = embedded.use(Path(database.folder)) if database.type == "embedded" else database.dsn
    except (ConfigError, embedded.ServerError) as exc:
        if _read is None:
            raise SystemExit(f"Error: {exc}") from None
        logs.setup(_read.settings.logging)
        log.error("settings-kept", extra={"fields": {"reason": str(exc)}})
    else:
        _read = Read(settings, handlers, dsn)
    return _read


def initial() -> Config:
    """What an application is made with."""
    return load() if _read is None else _read.settings


def own() -> Config:
    """What this instance was started with. Under gunicorn what its master read, also for a preloaded application."""
    return current_app.config["LOOM"] if _read is None else _read.settings


def settings() -> Config:
    """What this instance was started with, and over it what is shared, as its last heartbeat read it."""
    me = instances.current
    return own() if me is None else me.shared.over(own())
