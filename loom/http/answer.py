"""Responses: values as JSON, lists with a Link to their next page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from flask import Response, request

from loom.http.parse import MAX_ROWS, encode_cursor, integer

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
    fetch: Callable[[int], Sequence[T]], cursor_of: Callable[[T], Any], shown: Callable[[Sequence[T]], Any] = list
) -> Response:
    """One page of a list, as a JSON array, with a Link to the next page if there is one.

    `fetch` returns up to a number of rows, `cursor_of` the cursor of a row, `shown` what is answered for the rows.
    Without `limit` in the query, a page has up to 10,000 rows.
    """
    limit = integer("limit", most=MAX_ROWS, default=MAX_ROWS)
    rows = fetch(limit + 1)
    found = shown(rows[:limit])
    if len(rows) <= limit:
        return json(found)
    kept = {k: v for k, v in request.args.items() if k != "after"}
    query = urlencode({**kept, "limit": limit, "after": encode_cursor(cursor_of(rows[limit - 1]))})
    return json(found, headers={"Link": f'<{quote(request.path)}?{query}>; rel="next"'})
