"""The locks that are held, and one of them with its waiters and its history."""

from __future__ import annotations

from collections import Counter

from flask import Blueprint, Response

from loom import db, locks
from loom.http import parse
from loom.page.render import ROWS, parameter, show

bp = Blueprint("page_locks", __name__)

WAITERS = 100  # that are shown


@bp.get("/locks")
def held() -> Response:
    beginning, after = parameter("beginning"), parameter("after")
    with db.connection() as conn:
        page = locks.held(conn, prefix=beginning, after=after, limit=ROWS)
        found = list(page)
        names = [grant.lock_name for grant in found]
        waiting = Counter(row["lock_name"] for row in locks.waiters(conn, names, 10_000))
        more = found[-1].lock_name if page.more else None
        return show(conn, "locks.html", locks=found, waiting=waiting, beginning=beginning, after=after, more=more)


@bp.get("/lock")
def one() -> Response:
    name, before = parameter("name"), parse.cursor(int, "before")
    with db.connection() as conn:
        page = locks.history(conn, name=name, before=before, limit=ROWS)
        grants = list(page)
        waiters = locks.waiters(conn, [name], WAITERS + 1)
        return show(
            conn,
            "lock.html",
            name=name,
            grant=locks.get(conn, name),
            waiters=waiters[:WAITERS],
            many=len(waiters) > WAITERS,
            grants=grants,
            more=parse.encode_cursor(grants[-1].fencing_token) if page.more else None,
        )
