"""The responses to requests that the application never sees."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from gunicorn.http.errors import ExpectationFailed, LimitRequestHeaders, LimitRequestLine, UnsupportedTransferCoding

from loom import errors

STATUS: dict[type[Exception], tuple[int, type[errors.Error]]] = {
    LimitRequestLine: (414, errors.TooLarge),
    LimitRequestHeaders: (431, errors.TooLarge),
    ExpectationFailed: (417, errors.Invalid),
    UnsupportedTransferCoding: (501, errors.Invalid),
}


def status_of(exc: Exception) -> int:
    return exc.status if isinstance(exc, errors.Error) else STATUS.get(type(exc), (400, errors.Invalid))[0]


def refusal(exc: Exception, request_id: str) -> bytes:
    """The complete HTTP response to a request that cannot be parsed, or that failed with one of our errors."""
    status = status_of(exc)
    problem = exc if isinstance(exc, errors.Error) else STATUS.get(type(exc), (400, errors.Invalid))[1](str(exc))
    body = {"type": f"/problems/{problem.type}", "title": problem.title, "status": status}
    if problem.detail:
        body["detail"] = problem.detail
    content = msgspec.json.encode({**body, "error": problem.detail or problem.title})
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n"
        f"Content-Type: application/problem+json\r\nContent-Length: {len(content)}\r\n"
        f"X-Request-ID: {request_id}\r\n\r\n"
    )
    return head.encode() + content
