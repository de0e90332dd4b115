"""Idempotency-Key on every POST: applied once, whichever instances it reaches, and answered the same for a day."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import msgspec
from flask import Response, request

from loom import db, errors
from loom.state import idempotency
from loom.state.idempotency import Answer, Asked

Work = Callable[[db.Connection], Response]
Again = Callable[[db.Connection, Any], Any]

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def once(work: Work, *, again: Again | None = None, in_transaction: bool = False, wait: bool = False) -> Response:
    """Answers a POST: runs `work` or, if this is the retry of a request with a key, repeats its first answer.

    A view calls it after it has checked the whole request, headers included. With a key, the look for an earlier
    answer, `work` and the keeping of its answer are one transaction; only 2xx is kept. Without a key, `work` gets a
    connection, or one in a transaction with `in_transaction`.

    `again(conn, first)` is for an answer that may no longer be true when it is repeated. `first` is its JSON; it
    returns the JSON to answer instead, or raises what has become of it: ClaimLost. An answer without a body is then not
    kept.

    `wait`: a twin in flight is waited for, instead of refused; for `work` that is short and is called again and again.

    Raises InProgress, KeyReused, and Invalid for a bad key.
    """
    asked = _asked()
    if asked is None:
        with db.transaction() if in_transaction else db.connection() as conn:
            return work(conn)
    with db.transaction() as conn:
        first = idempotency.find(conn, asked, wait=wait)
        if first is not None:
            return _replay(conn, first, again)
        response = work(conn)
        if 200 <= response.status_code < 300 and (response.data or again is None):
            idempotency.keep_and_commit(conn, asked, _answer(response))
        return response


def caller() -> str:
    """Who asks: keys of different callers have nothing to do with each other. So far all are one."""
    return ""


def owner() -> str | None:
    """A name for what this request takes, the same for each of its retries; None without a key."""
    asked = _asked()
    return None if asked is None else asked.scope


def _asked() -> Asked | None:
    """This request, if it is a POST with a key. Raises Invalid."""
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is None or request.method != "POST" or request.routing_exception is not None:
        return None
    if not _KEY.fullmatch(key):
        raise errors.Invalid.field("Idempotency-Key", "must have 1 to 255 visible ASCII characters")
    said = hashlib.sha256(request.query_string + b"\0" + request.get_data()).digest()
    return Asked(key, request.method, request.path, caller(), said)


def _answer(response: Response) -> Answer:
    headers = {name: value for name, value in response.headers.items() if name != "Content-Length"}
    return Answer(response.status_code, headers, response.data)


def _replay(conn: db.Connection, first: Answer, again: Again | None) -> Response:
    body = first.body
    if again is not None:
        body = msgspec.json.encode(again(conn, msgspec.json.decode(body)))
    return Response(body, first.status, {**first.headers, "Idempotency-Replayed": "true"})
