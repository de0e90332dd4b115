"""Responses: values as JSON, lists with a Link to their next page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from flask import Response, request

from loom import db
from loom.bounds import bounds
from loom.http.parse import encode_cursor, integer

T = TypeVar("T")


def json(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None, kind: str = "application/json"
) -> Response:
    return Response(encoded(value), status, headers, content_type=kind)


def encoded(value: Any) -> bytes:
    """The value as JSON on one line, which ends with a newline, as a terminal expects."""
    return msgspec.json.encode(value) + b"\n"


def nothing() -> Response:
    return Response(status=204)


def page(
    fetch: Callable[[int], db.Page[T]], cursor_of: Callable[[T], Any], shown: Callable[[T], Any] = lambda row: row
) -> Response:
    """One page of a list, as a JSON array, with a Link to the next page if there is one.

    `fetch` returns up to a number of rows, `cursor_of` the cursor of a row, `shown` what is answered for it.
    """
    limit = page_limit()
    found = fetch(limit)
    body, last = BytesIO(), None
    for last in found:
        body.write(b"," if body.tell() else b"[")
        body.write(msgspec.json.encode(shown(last)))
    body.write(b"]\n" if body.tell() else b"[]\n")
    response = Response(body.getvalue(), content_type="application/json")
    return linked(response, limit, cursor_of(last)) if found.more and last is not None else response


def page_limit() -> int:
    """The number of rows that a page may have; in bytes, it is bounded by `bounds.page_bytes`."""
    return integer("limit", most=bounds.page, default=bounds.page)


def linked(response: Response, limit: int, cursor: Any) -> Response:
    """The response, with a Link to the page after the cursor."""
    kept = {k: v for k, v in request.args.items() if k != "after"}
    query = urlencode({**kept, "limit": limit, "after": encode_cursor(cursor)})
    response.headers["Link"] = f'<{quote(request.path)}?{query}>; rel="next"'
    return response
