"""The settings in force in this process."""

from __future__ import annotations

from flask import current_app

from loom import instances
from loom.config import Config, load

_inherited: Config | None = None  # the settings that this process's gunicorn master has read


def inherit(config: Config) -> None:
    """In a gunicorn master: makes its workers use the settings that it has read, also with a preloaded app."""
    global _inherited
    _inherited = config


def initial() -> Config:
    """The settings for a new application."""
    return load() if _inherited is None else _inherited


def own() -> Config:
    """The settings with which this instance was started; the defaults outside an application."""
    if _inherited is not None:
        return _inherited
    return current_app.config["LOOM"] if current_app else Config()


def settings() -> Config:
    """The settings with which this instance was started, overridden by the shared ones that its last heartbeat read."""
    me = instances.current
    return own() if me is None else me.shared.over(own())
