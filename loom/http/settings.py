"""The settings that are in force."""

from __future__ import annotations

from flask import current_app

from loom import instances
from loom.config import Config


def settings() -> Config:
    """What this instance was started with, and over it what is shared, as its last heartbeat read it."""
    me = instances.current
    return own() if me is None else me.shared.over(own())


def own() -> Config:
    """What this instance was started with."""
    return current_app.config["LOOM"]
