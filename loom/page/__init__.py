"""The operator's page: templates on the server, plain links and forms. A small library refreshes it in place."""

from __future__ import annotations

from flask import Flask
from werkzeug.exceptions import HTTPException

from loom import errors
from loom.page import actions, api, instances, locks, overview, render, state, work

PARTS = (render, overview, instances, locks, work, state, actions, api)
for _part in PARTS:
    _part.bp.register_error_handler(errors.Error, render.problem)
    _part.bp.register_error_handler(HTTPException, render.refusal)


def register(app: Flask) -> None:
    """Adds the routes of the page, whose errors are pages, too."""
    for part in PARTS:
        app.register_blueprint(part.bp)
