"""The log line and the row of each request, and the id that leads from an answer to its log lines and events."""

from __future__ import annotations

import functools
import logging
import random
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from flask import Request, Response

from loom import db, instances, log
from loom.http import settings
from loom.http.auth import CALLER, STRANGER
from loom.http.headers import REQUEST_ID
from loom.http.pollers import RECEIVED, client_gone
from loom.state import request_rows
from loom.state.request_rows import Row

STATE = "loom.request"  # in the environ: the RequestLog, also while the request waits
CLIENT_GONE = 499  # nginx's status for a request whose client has hung up
MOST_CHARACTERS = 500  # of a path that are logged
LOGGED = ("/api/v1/", "/actions/")  # at info; the operator's page, which refreshes itself, at debug
QUIET = ("/api/v1/health",)  # at debug, too
NAMED = {"locks": "lock", "beads": "bead", "agents": "agent", "providers": "provider", "projects": "project"}
PARAMETERS = {"locks": "{name}", "file-locks": "{project_id}/{path}", "config": "{key}"}  # in the contract; else {id}

logger = logging.getLogger("loom.http")


class Route(NamedTuple):
    """`template`: as in the contract. `named`: the field for the name or id in the path, if it has one."""

    template: str | None
    named: str | None
    level: int


@functools.cache
def route(rule: str | None) -> Route:
    """What is logged of a rule of the application; None: no route fits the path."""
    if rule is None:
        return Route(None, None, logging.INFO)
    word = rule.removeprefix("/api/v1/").partition("/")[0]
    template = re.sub("<[^>]*>", PARAMETERS.get(word, "{id}"), rule)
    level = logging.INFO if rule.startswith(LOGGED) and not rule.startswith(QUIET) else logging.DEBUG
    return Route(template, NAMED.get(word) if "<" in rule else None, level)


class RequestLog:
    """One request from its arrival to its end. If it waits, it is run several times in between."""

    __slots__ = ("_args", "_database", "_environ", "_rule", "_started", "_written", "request_id")

    def __init__(self, environ: dict[str, Any], rule: str | None, args: Mapping[str, Any]) -> None:
        """Gives the request its id, as nginx does: the client's if it is harmless, else a new one."""
        self.request_id = environ["HTTP_X_REQUEST_ID"] = request_id(environ.get("HTTP_X_REQUEST_ID"))
        self._environ, self._rule, self._args = environ, rule, args
        self._started: float = environ.get(RECEIVED) or time.monotonic()
        self._database = 0.0
        self._written = False

    def wait(self) -> None:
        """Called when the request ends to be run again."""
        self._database += db.seconds_spent()

    def write(self, status: int, database: float = 0.0) -> None:
        """Writes the line and the row, once. `database`: seconds that statements have taken in the last run."""
        if self._written:
            return
        self._written = True
        about = route(self._rule)
        config = settings.own()
        if not _wanted(config.logging.requests, status):
            return
        rows = request_rows.current if about.level > logging.DEBUG else None
        line = logger.isEnabledFor(about.level)
        if rows is None and not line:
            return
        ended, instance_id, method = time.monotonic(), instances.own_id(), self._environ["REQUEST_METHOD"]
        path = self._environ["PATH_INFO"].encode("latin-1").decode(errors="replace")[:MOST_CHARACTERS]
        duration = round((ended - self._started) * 1000, 2)
        spent = round((self._database + database) * 1000, 2)
        who = self._environ.get(CALLER, STRANGER).principal
        name = next(iter(self._args.values()))[:MOST_CHARACTERS] if about.named is not None else None
        if rows is not None:
            about_row = (self.request_id, instance_id, who, method, about.template, path, status, duration, spent)
            rows.put(Row(ended, *about_row, about.named, name))
        if line:
            fields = {
                "request_id": self.request_id,
                "instance_id": instance_id,
                "port": config.server.http_port,
                "method": method,
                "route": about.template,
                "path": path,
                "status": status,
                "duration_ms": duration,
                "database_ms": spent,
                "caller": who,
            }
            if about.named is not None:
                fields[about.named] = name
            log.write("request", about.level, fields)


def begin(request: Request) -> RequestLog:
    """The RequestLog of a request that is run now, perhaps not for the first time."""
    found: RequestLog | None = request.environ.get(STATE)
    if found is None:
        rule = request.url_rule
        found = RequestLog(request.environ, None if rule is None else rule.rule, request.view_args or {})
        request.environ[STATE] = found
    log.this_thread.request_id = found.request_id
    return found


def end(request: Request, response: Response) -> None:
    """Adds the id to the answer, and writes the line."""
    found = begin(request)
    response.headers.add("X-Request-ID", found.request_id)  # no answer has one yet
    found.write(response.status_code, db.seconds_spent())


def abandoned(environ: dict[str, Any]) -> bool:
    """Whether the client has hung up, so that the request gets no answer; then writes its line."""
    gone = client_gone(environ)
    if gone:
        (environ.get(STATE) or RequestLog(environ, None, {})).write(CLIENT_GONE)
    return gone


def refused(status: int, head: Any, started: float, environ: dict[str, Any] | None) -> str:
    """Writes the line of a request that the application has not seen, or has failed to answer. Returns its id.

    `head`: gunicorn's request, if the server could read it; `environ`: if the application was called.
    """
    if environ is None:
        environ = {"REQUEST_METHOD": None, "PATH_INFO": "", RECEIVED: started}
        if head is not None:
            environ |= {"REQUEST_METHOD": head.method, "PATH_INFO": unquote_to_bytes(head.path).decode("latin-1")}
            environ |= {f"HTTP_{name.replace('-', '_')}": value for name, value in head.headers}
    found = environ.get(STATE) or RequestLog(environ, None, {})
    found.write(status)
    return found.request_id


def request_id(given: str | None) -> str:
    """The id that a client has chosen, or a new one if there is none, or a malformed one."""
    if given and REQUEST_ID.fullmatch(given):
        return given
    return f"{random.getrandbits(128):032x}"  # not a secret; os.urandom() would release the interpreter's lock


def _wanted(which: str, status: int) -> bool:
    return which == "all" or (which == "errors" and status >= 400)
