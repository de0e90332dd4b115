"""The rest of the shared state: agents, providers, configuration; and the feed of what changed."""

from __future__ import annotations

from typing import get_args

from flask import Blueprint, Response

from loom import db, errors, locks
from loom.http import parse
from loom.page.render import ROWS, parameter, show
from loom.state import backlog, config, entities, events
from loom.state.agents import Agent
from loom.state.entities import Versioned
from loom.state.providers import Provider

bp = Blueprint("page_state", __name__)

EACH = 5  # beads of an agent in the list


@bp.get("/agents")
def agents() -> Response:
    after = parameter("after")
    with db.connection() as conn:
        page = entities.some(conn, Agent, filters={}, after=after, limit=ROWS)
        found = list(page)
        work = backlog.held_by(conn, [agent.id for agent in found], EACH)
        more = found[-1].id if page.more else None
        return show(conn, "agents.html", agents=found, work=work, each=EACH, after=after, more=more)


@bp.get("/agent")
def agent() -> Response:
    key = parameter("id")
    with db.connection() as conn:
        found = entities.get(conn, Agent, key)
        return show(
            conn,
            "agent.html",
            agent=found,
            beads=backlog.held_by(conn, [key], ROWS).get(key, []),
            locks=list(locks.held(conn, owner=key, limit=ROWS)),
            **_history(conn, Agent, key),
        )


@bp.get("/providers")
def providers() -> Response:
    after = parameter("after")
    with db.connection() as conn:
        page = entities.some(conn, Provider, filters={}, after=after, limit=ROWS)
        found = list(page)
        return show(conn, "providers.html", providers=found, after=after, more=found[-1].id if page.more else None)


@bp.get("/provider")
def provider() -> Response:
    key = parameter("id")
    with db.connection() as conn:
        return show(conn, "provider.html", provider=entities.get(conn, Provider, key), **_history(conn, Provider, key))


@bp.get("/config")
def settings() -> Response:
    with db.connection() as conn:
        return show(conn, "config.html", values=config.values(conn))


@bp.get("/setting")
def setting() -> Response:
    key = parameter("key")
    with db.connection() as conn:
        found = entities.get(conn, config.Config, key)
        value = bytes(found.value).decode()
        return show(conn, "setting.html", setting=found, value=value, **_history(conn, config.Config, key))


@bp.get("/events")
def feed() -> Response:
    """The newest first; `until` is the id of the newest that is shown."""
    kind, until = parameter("type"), parse.cursor(int, "until")
    types = sorted(t for one in get_args(events.Type) for t in (get_args(one) or (one,)))
    with db.connection() as conn:
        after = None if until is None else max(0, until - ROWS)
        wanted = kind if kind in types else None
        try:
            read = events.read(conn, after, ROWS, type=wanted)
        except errors.CursorExpired:
            read = events.read(conn, 0, ROWS, type=wanted)  # the oldest that are kept
        found = [event for event in reversed(read.events) if until is None or (event.id or 0) <= until]
        older = None if kind or len(found) < ROWS else (found[-1].id or 0) - 1
        return show(
            conn,
            "events.html",
            events=found,
            kind=kind,
            types=types,
            until=until,
            older=None if older is None else parse.encode_cursor(older),
        )


def _history(conn: db.Connection, kind: type[Versioned], key: str) -> dict[str, object]:
    """The newest entries of an entity's history, for its template."""
    before = parse.cursor(int, "before")
    page = events.history(conn, kind.kind, key, before=before, limit=ROWS)
    entries = list(page)
    return {"entries": entries, "more": parse.encode_cursor(entries[-1].place) if page.more else None}
