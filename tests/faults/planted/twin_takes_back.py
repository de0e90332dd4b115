"""A key's answer is stored only after the grant; the second twin releases the grant that the first one was told of."""

from __future__ import annotations

from typing import Any

from flask import Response

from app import app as app
from loom import db, locks
from loom.http import idempotency as http
from loom.state import idempotency

once = http.once


def once_but_apart(
    work: http.Work, *, refresh: http.Refresh | None = None, wait: bool = False, **more: Any
) -> Response:
    asked = http._asked()
    if asked is None or not wait:
        return once(work, refresh=refresh, wait=wait, **more)
    with db.transaction() as conn:
        first = idempotency.find(conn, asked, wait=True)
        if first is not None:
            return http._replay(conn, first, refresh)
    with db.connection() as conn:
        response = work(conn)
    if response.status_code == 409:
        return response
    with db.transaction() as conn:
        first = idempotency.find(conn, asked, wait=True)
        if first is None:
            idempotency.keep_and_commit(conn, asked, http._answer(response))
            return response
    grant = response.get_json()
    with db.connection() as conn:
        locks.release(conn, grant["lock_name"], grant["fencing_token"])
        return http._replay(conn, first, refresh)


http.once = once_but_apart
