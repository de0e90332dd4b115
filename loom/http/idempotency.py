"""Idempotency-Key on every POST: applied once, whichever instances it reaches, and answered the same for a day."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from flask import Response, current_app, request

from loom import db, errors
from loom.state import idempotency
from loom.state.idempotency import Answer, Asked

View = TypeVar("View", bound=Callable[..., Response])

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class Check(msgspec.Struct, frozen=True):
    """How a view's answer of before is looked at once more; see `checked`."""

    again: Callable[..., Any] | None = None
    by_itself: bool = False


_checks: dict[Callable[..., Any], Check] = {}


def checked(again: Callable[..., Any], *, by_itself: bool = False) -> Callable[[View], View]:
    """For a view whose answer may be true no longer when it is repeated: then `again(first)` is called.

    `first` is the first answer's JSON. `again` returns what is answered in its stead, or None when it stands as it is,
    and raises what has become of it: ClaimLost. An answer without a body is not kept.

    `by_itself`: the view waits, so it may run in no transaction, and twins run it at once. It must find what it did
    before by `owner()`. The twin that is later calls `again(first, made)`: the JSON of its own answer if it is a 201.
    """

    def mark(view: View) -> View:
        _checks[view] = Check(again, by_itself)
        return view

    return mark


def caller() -> str:
    """Who asks: keys of different callers have nothing to do with each other. So far all are one."""
    return ""


def owner() -> str | None:
    """A name for what this request takes, the same for each of its retries; None without a key."""
    asked = _asked()
    return None if asked is None else asked.scope


def once(view: Callable[[], Response]) -> Response:
    """What `view` answers or, if this is the retry of a POST with a key, what it answered the first time.

    Only 2xx is kept. Raises Invalid, InProgress and KeyReused.
    """
    asked = _asked()
    if asked is None:
        return view()
    check = _checks.get(current_app.view_functions[request.endpoint or ""], Check())
    if check.by_itself:
        return _by_itself(view, asked, check)
    with db.transaction() as conn:
        first = idempotency.find(conn, asked, alone=True)
        if first is not None:
            return _replay(first, check)
        response = view()
        if _is_kept(response, check):
            idempotency.keep_and_commit(conn, asked, _answer(response))
        return response


def _by_itself(view: Callable[[], Response], asked: Asked, check: Check) -> Response:
    with db.connection() as conn:
        first = idempotency.find(conn, asked, alone=False)
    if first is not None:
        return _replay(first, check)
    response = view()
    if not _is_kept(response, check):
        return response
    with db.connection() as conn:
        if idempotency.keep(conn, asked, _answer(response)):
            return response
        first = idempotency.find(conn, asked, alone=False)
    if first is None:
        return response
    return _replay(first, check, msgspec.json.decode(response.data) if response.status_code == 201 else None)


def _asked() -> Asked | None:
    """This request, if it is a POST with a key. Raises Invalid."""
    key = request.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is None or request.method != "POST" or request.routing_exception is not None:
        return None
    if not _KEY.fullmatch(key):
        raise errors.Invalid.field("Idempotency-Key", "must have 1 to 255 visible ASCII characters")
    said = hashlib.sha256(request.query_string + b"\0" + request.get_data()).digest()
    return Asked(key, request.method, request.path, caller(), said)


def _is_kept(response: Response, check: Check) -> bool:
    return 200 <= response.status_code < 300 and bool(check.again is None or response.data)


def _answer(response: Response) -> Answer:
    headers = {name: value for name, value in response.headers.items() if name != "Content-Length"}
    return Answer(response.status_code, headers, response.data)


def _replay(first: Answer, check: Check, *made: Any) -> Response:
    body = first.body
    if check.again is not None:
        now = check.again(msgspec.json.decode(body), *made)
        body = body if now is None else msgspec.json.encode(now)
    return Response(body, first.status, {**first.headers, "Idempotency-Replayed": "true"})
