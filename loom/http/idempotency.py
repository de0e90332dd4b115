"""Idempotency-Key on every POST: applied once, whichever instances receive it, with the same answer for a day."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import msgspec
from flask import Response, request

from loom import db, errors
from loom.http import auth
from loom.http.answer import encoded
from loom.state import idempotency
from loom.state.idempotency import Answer, Asked

Work = Callable[[db.Connection], Response]
Refresh = Callable[[db.Connection, Any], Any]

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def once(work: Work, *, refresh: Refresh | None = None, in_transaction: bool = False, wait: bool = False) -> Response:
    """Answers a POST: runs `work` or, if this is the retry of a request with a key, repeats its first answer.

    A view calls it after it has checked the whole request, headers included. With a key, one transaction looks for an
    earlier answer, runs `work` and stores its answer; only 2xx answers are stored. Without a key, `work` gets a
    connection, which is in a transaction if `in_transaction` is true.

    `refresh(conn, first)` is for answers that may have become untrue when they are repeated. `first` is the JSON of the
    first answer; `refresh` returns the JSON to answer instead, or raises an error such as ClaimLost. With `refresh`,
    an answer without a body is not stored.

    `wait`: wait for another request in progress with the same key, instead of refusing this one; for short `work` that
    clients repeat often.

    Raises InProgress, KeyReused, and Invalid for a bad key.
    """
    asked = _asked()
    if asked is None:
        with db.transaction() if in_transaction else db.connection() as conn:
            return work(conn)
    with db.transaction() as conn:
        first = idempotency.find(conn, asked, wait=wait)
        if first is not None:
            return _replay(conn, first, refresh)
        response = work(conn)
        if 200 <= response.status_code < 300 and (response.data or refresh is None):
            idempotency.keep_and_commit(conn, asked, _answer(response))
        return response


def caller() -> str:
    """The principal that makes this request, in whose scope a key is unique."""
    return auth.caller().principal


def owner() -> str | None:
    """An owner for the lock that this request acquires, the same for each of its retries; None without a key."""
    asked = _asked()
    return None if asked is None else asked.scope


def _asked() -> Asked | None:
    """This request, if it is a POST with a key. Raises Invalid."""
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is None or request.method != "POST" or request.routing_exception is not None:
        return None
    if not _KEY.fullmatch(key):
        raise errors.Invalid.field("Idempotency-Key", "must have 1 to 255 visible ASCII characters")
    fingerprint = hashlib.sha256(request.query_string + b"\0" + request.get_data()).digest()
    return Asked(key, request.method, request.path, caller(), fingerprint)


def _answer(response: Response) -> Answer:
    headers = {name: value for name, value in response.headers.items() if name != "Content-Length"}
    return Answer(response.status_code, headers, response.data)


def _replay(conn: db.Connection, first: Answer, refresh: Refresh | None) -> Response:
    body = first.body
    if refresh is not None:
        body = encoded(refresh(conn, msgspec.json.decode(body)))
    return Response(body, first.status, {**first.headers, "Idempotency-Replayed": "true"})
