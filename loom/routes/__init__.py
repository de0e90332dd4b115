"""The routes: each parses its request, calls one domain function, and answers JSON."""

from __future__ import annotations

import codecs

from loom import page
from loom.config import Config
from loom.http import permissions, settings
from loom.http.application import Application
from loom.http.parse import prepare
from loom.routes import (
    agents,
    analytics,
    beads,
    claims,
    config,
    events,
    file_locks,
    grants,
    health,
    instances,
    keys,
    locks,
    logs,
    metrics,
    openapi,
    projects,
    providers,
    work_graph,
)

CODECS = ("idna", "utf-8-sig")  # Python imports a codec at its first use


def create_app(given: Config | None = None) -> Application:
    """Creates the application, which uses the process's database (`db.configure`) and instance."""
    app = Application(given or settings.initial())
    for routes in (
        *(health, instances, locks, grants, providers, projects, agents, beads, claims, file_locks, work_graph),
        *(config, events, keys, logs, analytics, metrics, openapi),
    ):
        app.register_blueprint(routes.bp)
    page.register(app)
    permissions.check(app.url_map.iter_rules())
    prepare()
    for name in CODECS:  # so that no request has to import one
        codecs.lookup(name)
    return app
