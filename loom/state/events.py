"""Events: one row per version of every entity. All of them are the feed, those of one entity its history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from loom import db, errors
from loom.db import Time
from loom.waiting import Poller, Waiter

SCAN = 10_000  # events that a read with a filter looks at; 8 ms when none of them matches

# The times that a version has.
TIMES = {
    "created_at",
    "closed_at",
    "due_date",
    "not_before",
    "started_at",
    "last_heartbeat_at",
    "last_sync_at",
    "updated_at",
    "last_active",
}


Type = Literal[  # noqa: RUF041 - what event_type() in loom/sql/events.sql and loom/transfer make
    Literal["project.created", "project.updated", "project.deleted", "project.imported"],
    Literal["provider.registered", "provider.updated", "provider.deleted", "provider.imported"],
    Literal["agent.spawned", "agent.updated", "agent.status_change", "agent.deleted", "agent.imported"],
    Literal["bead.created", "bead.updated", "bead.assigned", "bead.status_change", "bead.completed", "bead.deleted"],
    Literal["bead.imported", "config.imported", "comment.imported"],
    Literal["config.updated", "config.deleted"],
    Literal["comment.created", "comment.updated", "comment.deleted"],
]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """The columns of an event."""

    id: int | None
    type: Type
    entity_type: str
    entity_id: str
    project_id: str | None
    version: int
    actor: str
    principal: str | None
    instance_id: str | None
    timestamp: Time
    request_id: str | None
    changes: dict[str, msgspec.Raw]


class Event(Change, frozen=True, kw_only=True):
    """A change. `id` is its cursor, null until it is numbered.

    `changes`: the fields that changed, with their new values; of an object the keys that changed, as in a merge patch.
    `source` and `data` are for the original's clients; `data` has the id of the entity, and that of its project.
    """

    source: str
    data: dict[str, str]


class Row(Change, frozen=True, kw_only=True):
    """`place` orders events as they were inserted."""

    place: int


class Entry(NamedTuple):
    """An event of an entity's history; `place` orders them."""

    place: int
    event: Event


class Found(msgspec.Struct, frozen=True):
    """One row of a read: which events there are, and one of them, if any. `first`: where the read begins."""

    first: int | None
    last: int
    expired: bool | None
    event: Row | None


class Page(NamedTuple):
    """Events, oldest first; `next` is where to go on, `last` the newest there is."""

    events: list[Event]
    next: int
    last: int


def number(conn: db.Connection) -> bool:
    """Numbers a batch of what has been committed. Whether there may be more."""
    return db.value(conn, "SELECT number_events(10000) = 10000")


def read(conn: db.Connection, after: int | None, limit: int, **filters: str | None) -> Page:
    """The events that follow the cursor, 0 for the oldest kept; the latest ones without a cursor.

    None follow one beyond the end, as a reader has it whose database was set back: the ids to come are greater.
    filters: `type`, `entity_id`, `project_id`. With one, it looks at SCAN events at most: `next` is then behind what it
    has seen, and the end is reached only when that is `last`.
    Raises CursorExpired.
    """
    # By itself: who is frozen while it takes the page must not keep the others from numbering.
    number(conn)
    wanted = {name: value for name, value in filters.items() if value is not None}
    where = "WHERE " + " AND ".join(f"{name} = %({name})s" for name in wanted) if wanted else ""
    if after is None:
        first = f"COALESCE((SELECT id FROM event_numbers ORDER BY id DESC OFFSET {SCAN - 1} LIMIT 1), 0)"
        until, order = "last", "DESC"
    else:
        first = "(SELECT id FROM event_numbers WHERE id > %(after)s ORDER BY id LIMIT 1)"
        until, order = f"first + {SCAN - 1}", "ASC"
    sql = f"""
        WITH here AS MATERIALIZED (
            SELECT {first} AS first, COALESCE((SELECT max(id) FROM event_numbers), 0) AS last,
                   %(after)s < events_forgotten AND %(after)s > 0
                   AND COALESCE((SELECT min(id) FROM event_numbers) > %(after)s + 1, true) AS expired
              FROM cluster LIMIT 1) -- or the planner expects many, and compiles for 100 ms
        SELECT json_build_object('first', first, 'last', last, 'expired', expired,
                                 'event', CASE WHEN e.id IS NOT NULL THEN row_to_json(e) END)::text
          FROM here LEFT JOIN LATERAL (
            -- OFFSET 0: a filter looks at these, and does not make the planner look at all the others.
            SELECT * FROM (SELECT * FROM feed WHERE id BETWEEN first AND {until} ORDER BY id {order} OFFSET 0) AS f
             {where} LIMIT %(most_rows)s) AS e ON expired IS NOT TRUE
         ORDER BY e.id {order}
        """
    page = db.Page(conn, Found, sql, limit, after=after, **wanted)
    rows = list(page)
    here = rows[0]
    if here.expired:
        raise errors.CursorExpired("Events after it have been removed. after=0 is the oldest that is kept.")
    found = [_event(row.event) for row in rows if row.event is not None]
    if after is None:
        return Page(found[::-1], here.last, here.last)
    if rows[-1].event is not None and (page.more or len(found) == limit):
        return Page(found, rows[-1].event.id or 0, here.last)
    return Page(found, min(here.first + SCAN - 1, here.last) if here.first else after, here.last)


def history(conn: db.Connection, kind: str, key: str, *, before: int | None = None, limit: int) -> db.Page[Entry]:
    """What happened to one entity, newest first, also before it was deleted; `before`: a place to go on from.

    What nobody has read in the feed yet has no id.
    """
    sql = f"""
        SELECT row_to_json(h)::text FROM (
            SELECT n.id, e.* FROM events e LEFT JOIN event_numbers n ON n.place = e.place
             WHERE e.entity_type = %(kind)s AND e.entity_id = %(key)s{" AND e.place < %(before)s" if before else ""}
             ORDER BY e.place DESC LIMIT %(most_rows)s + 1) AS h
        """
    return db.Page(conn, _entry, sql, limit, kind=kind, key=key, before=before)


def _entry(raw: bytes) -> Entry:
    row = _row(raw)
    return Entry(row.place, _event(row))


_row = msgspec.json.Decoder(Row).decode


def _event(row: Row) -> Event:
    known = {name: getattr(row, name) for name in Change.__struct_fields__}
    known["changes"] = {name: _time(value) if name in TIMES else value for name, value in row.changes.items()}
    data = {f"{row.entity_type}_id": row.entity_id}
    if row.project_id is not None:
        data.setdefault("project_id", row.project_id)
    return Event(**known, source=row.instance_id or "loom", data=data)


def _time(value: msgspec.Raw) -> msgspec.Raw:
    """As the entity itself is answered; PostgreSQL writes times into JSON in another way."""
    try:
        return msgspec.Raw(msgspec.json.encode(msgspec.json.decode(value, type=Time)))
    except msgspec.ValidationError:  # null; or infinity, by hand
        return value


class EventWaiter(Waiter):
    """A request that waits for an event after the cursor. Its result is the id of the newest event."""

    def __init__(self, after: int, ends: float, client_gone: Callable[[], bool]) -> None:
        super().__init__(ends, client_gone)
        self.after = after


class EventPoller(Poller[EventWaiter]):
    """The requests of one worker that wait for events."""

    name = "events"
    period = 0.2  # seconds; two or three index lookups a poll

    def poll(self, conn: db.Connection, waiters: list[EventWaiter]) -> None:
        last = db.value(conn, "SELECT number_events(); SELECT COALESCE(max(id), 0) FROM event_numbers")
        self.wake(lambda waiter: waiter.after < last, last)
