"""The settings that are in force."""

from __future__ import annotations

from flask import current_app

from loom import instances
from loom.config import Config, load

_inherited: Config | None = None  # what this process's gunicorn master has read


def inherit(config: Config) -> None:
    """In a gunicorn master: its workers go by what it has read, also by an application that is preloaded."""
    global _inherited
    _inherited = config


def initial() -> Config:
    """What an application is made with."""
    return load() if _inherited is None else _inherited


def own() -> Config:
    """What this instance was started with."""
    return current_app.config["LOOM"] if _inherited is None else _inherited


def settings() -> Config:
    """What this instance was started with, and over it what is shared, as its last heartbeat read it."""
    me = instances.current
    return own() if me is None else me.shared.over(own())
