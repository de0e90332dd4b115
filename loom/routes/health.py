"""/health for people and monitors; /health/live: the process answers; /health/ready: send it requests."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

from flask import Blueprint, Response

from loom import __version__, db, errors, instances
from loom.http import answer, auth
from loom.http.permissions import READER

bp = Blueprint("health", __name__)


def _now() -> datetime:
    """This host's clock, for information only: no decision depends on it."""
    return datetime.now(timezone.utc)


def _database_health() -> tuple[int | None, dict[str, Any]]:
    """The number of active instances (None without a database), and the state of the database."""
    started = time.monotonic()
    try:
        with db.connection() as conn:
            count = instances.active(conn)
    except errors.Error as exc:  # also if the database lacks our tables
        return None, {"status": "unhealthy", "message": db.default().away or exc.detail or exc.title}
    return count, {"status": "healthy", "latency_ms": round((time.monotonic() - started) * 1000)}


def _may_see_details() -> bool:
    """Not strangers: a message of the database names hosts and roles."""
    return auth.caller().rank >= READER


@bp.get("/health")
def health() -> Response:
    count, database = _database_health()
    healthy = count is not None
    me = instances.current
    body: dict[str, Any] = {
        "healthy": healthy,
        "instance_id": me and me.instance_id,
        "database": "connected" if healthy else "disconnected",
        "active_instances": count,
    }
    if _may_see_details():
        body |= {
            "status": "healthy" if healthy else "unhealthy",
            "timestamp": _now(),
            "uptime_seconds": round(time.monotonic() - me.started) if me else 0,
            "version": __version__,
            "draining": me is not None and me.draining,
            "dependencies": {"database": database},
            "metrics": {"connections": db.default().usage()},
        }
    return answer.json(body, 200 if healthy else 503, {} if healthy else {"Retry-After": "1"})


@bp.get("/health/live")
def live() -> Response:
    return answer.json({"status": "alive", "timestamp": _now()})


@bp.get("/health/ready")
def ready() -> Response:
    me = instances.current
    _, database = _database_health()
    is_ready = database["status"] == "healthy" and not (me and me.draining)
    if not _may_see_details():
        database = {"status": database["status"]}
    return answer.json(
        {
            "ready": is_ready,
            "timestamp": _now(),
            "draining": me is not None and me.draining,
            "dependencies": {"database": database},
        },
        200 if is_ready else 503,
    )


@bp.get("/api/v1/health")
def ok() -> Response:
    return answer.json({"status": "ok"})
