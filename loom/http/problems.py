"""Errors as application/problem+json (RFC 9457); the member `error` is one line for older clients."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from flask import Flask, Response, request
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge

from loom import errors
from loom.http.answer import json
from loom.http.parse import too_large
from loom.locks import Grant

KIND = "application/problem+json"

log = logging.getLogger("loom.http")


def answer(exc: errors.Error) -> Response:
    """The problem document of an error."""
    body: dict[str, Any] = {"type": f"/problems/{exc.type}", "title": exc.title, "status": exc.status}
    if exc.detail:
        body["detail"] = exc.detail
    body.update(exc.members)
    if isinstance(body.get("holder"), Grant):  # only the holder may know its token
        body["holder"] = msgspec.structs.asdict(body["holder"])
        del body["holder"]["fencing_token"]
    body.setdefault("error", exc.detail or exc.title)
    response = json(body, exc.status, kind=KIND)
    if exc.status == errors.Unauthorized.status:
        response.headers["WWW-Authenticate"] = 'Bearer realm="Loom"'
    if exc.retry_after is not None:
        response.headers["Retry-After"] = str(exc.retry_after)
    return response


def unforeseen(exc: Exception) -> Response:
    """An error in Loom itself: the caller learns only that there was one, the log has the details."""
    log.error("request-failed", exc_info=exc, extra={"fields": {"method": request.method, "path": request.path}})
    return answer(errors.Error())


def register(app: Flask) -> None:
    app.register_error_handler(Exception, unforeseen)

    @app.errorhandler(errors.Error)
    def ours(exc: errors.Error) -> Response:
        if exc.status == 500:
            return unforeseen(exc)
        return answer(exc)

    @app.errorhandler(HTTPException)
    def werkzeugs(exc: HTTPException) -> Response:
        """The errors that Flask raises itself, such as 404 of the router, 405 and 413."""
        if isinstance(exc, RequestEntityTooLarge):
            return answer(too_large())
        if isinstance(exc, ClientDisconnected):
            return answer(errors.Stalled())
        code = exc.code or 500
        body = {
            "type": "/problems/" + (exc.name or "error").lower().replace(" ", "-"),
            "title": f"{exc.name}.",
            "status": code,
            "error": f"{exc.name}.",
        }
        response = json(body, code, kind=KIND)
        for name, value in exc.get_headers():
            if name.lower() in ("allow", "retry-after"):
                response.headers[name] = value
        return response
