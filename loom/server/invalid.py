"""The responses to requests that the application never sees."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from gunicorn.http.errors import ExpectationFailed, LimitRequestHeaders, LimitRequestLine, UnsupportedTransferCoding
from gunicorn.http.message import Request

from loom import errors
from loom.http import metrics
from loom.http.answer import encoded
from loom.http.request_log import refused

STATUS: dict[type[Exception], tuple[int, type[errors.Error]]] = {
    LimitRequestLine: (414, errors.TooLarge),
    LimitRequestHeaders: (431, errors.TooLarge),
    ExpectationFailed: (417, errors.Invalid),
    UnsupportedTransferCoding: (501, errors.Invalid),
}


def refusal(exc: Exception, request: Request | None, started: float, environ: dict[str, Any] | None) -> bytes:
    """The complete HTTP response to a request that cannot be parsed, or that failed with one of our errors.

    Also writes its log line; see request_log.refused for the parameters.
    """
    if isinstance(exc, errors.Error):
        status, problem = exc.status, exc
    else:
        status, kind = STATUS.get(type(exc), (400, errors.Invalid))
        problem = kind(str(exc))
    metrics.count_refusal(status)
    request_id = refused(status, request, started, environ)
    body = {"type": f"/problems/{problem.type}", "title": problem.title, "status": status}
    if problem.detail:
        body["detail"] = problem.detail
    content = encoded({**body, "error": problem.detail or problem.title})
    retry = f"Retry-After: {problem.retry_after}\r\n" if problem.retry_after is not None else ""
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n{retry}"
        f"Content-Type: application/problem+json\r\nContent-Length: {len(content)}\r\n"
        f"X-Request-ID: {request_id}\r\n\r\n"
    )
    return head.encode() + content
