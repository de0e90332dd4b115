"""The settings that are in force."""

from __future__ import annotations

from flask import current_app

from loom.config import Config


def settings() -> Config:
    return current_app.config["LOOM"]
