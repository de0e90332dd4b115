"""The WSGI application: routes parse, call one domain function, and answer JSON."""

from __future__ import annotations

from flask import Flask, request
from flask.wrappers import Response

from loom import db
from loom import instances as registry
from loom.config import Config, load
from loom.http import grants, health, instances, locks, problems
from loom.http.parse import NameConverter

MAX_BODY = 1024 * 1024  # bytes
WITHOUT_DATABASE = ("/health", "/api/v1/health")


def create_app(config: Config | None = None) -> Flask:
    """The application on the process's own database (`db.configure`) and instance."""
    app = Flask("loom", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.config["LOOM"] = config or load()
    app.url_map.merge_slashes = False  # else /locks//a would lead to the lock "a"
    app.url_map.converters["name"] = NameConverter
    for routes in (health, instances, locks, grants):
        app.register_blueprint(routes.bp)
    problems.register(app)

    @app.before_request
    def begin() -> None:
        """Starts the clock that bounds the request, and refuses it when we may have been declared dead."""
        db.default().start_request()
        if registry.current is not None and not request.path.startswith(WITHOUT_DATABASE):
            registry.current.confirm()

    @app.teardown_request
    def end(exc: BaseException | None) -> None:
        db.default().end_request()

    @app.after_request
    def name_request(response: Response) -> Response:
        request_id = request.headers.get("X-Request-ID")
        if request_id:
            response.headers["X-Request-ID"] = request_id
        return response

    return app
