"""HTML from templates, with the headers of every page; and the static files, whose addresses change with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
import msgspec
from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException

from loom import __version__, db, errors, instances, overview
from loom.http import problems
from loom.state import work_graph

bp = Blueprint("page", __name__)

ROWS = 50  # of a list, on a page
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
NO_STORE = {"Cache-Control": "no-store"}
FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}
KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
FILES = {path.name: path.read_bytes() for path in (Path(__file__).parent / "static").iterdir() if path.suffix in KINDS}
DIGESTS = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in FILES.items()}
NAVIGATION = (
    ("/", "Overview"),
    ("/instances", "Instances"),
    ("/locks", "Locks"),
    ("/beads", "Beads"),
    ("/agents", "Agents"),
    ("/providers", "Providers"),
    ("/config", "Configuration"),
    ("/events", "Events"),
    ("/api", "API"),
)
DONE = {  # what a page says after an action
    "release-lock": "The lock was released.",
    "give-back-bead": "The bead was given back.",
    "unblock-bead": "The bead is open again.",
    "drain-instance": "The instance was ordered to drain: it obeys within 6 s.",
    "activate-instance": "The instance was ordered to be active: it obeys within 6 s.",
}
SILENT = {"id", "created_at", "key", "version"}  # fields that tell nothing in a list of events
PARENTS = {  # the part of the navigation to which a page belongs, unless it is one itself
    **{"/instance": "/instances", "/lock": "/locks", "/agent": "/agents", "/provider": "/providers"},
    **dict.fromkeys(("/bead", "/ready", "/leases", "/stuck"), "/beads"),
    "/setting": "/config",
}


def html(template: str, status: int = 200, headers: dict[str, str] | None = None, **values: Any) -> Response:
    """A page. Templates escape every value; an unknown one is an error."""
    path = request.path
    text = _environment.get_template(template).render(
        path=PARENTS.get(path, path), here=request.full_path.rstrip("?"), q=values.pop("q", ""), **values
    )
    return Response(text, status, {**HEADERS, **NO_STORE, **(headers or {})}, content_type="text/html; charset=utf-8")


def show(conn: db.Connection, template: str, **values: Any) -> Response:
    """A page with the health of the cluster at its top."""
    done = DONE.get(parameter("done"), "")
    return html(template, health=overview.health(conn), now=work_graph.now(conn), done=done, **values)


def problem(exc: errors.Error) -> Response:
    """An error as a page: an outage says since when, and what to do."""
    headers = {} if exc.retry_after is None else {"Retry-After": str(exc.retry_after)}
    if isinstance(exc, errors.Unavailable) and not isinstance(exc, errors.Busy):
        since, why = db.away()
        return html("outage.html", exc.status, headers, why=why or exc.detail, since=since, seconds=_seconds(since))
    if exc.status == 500:
        return problems.unforeseen(exc)
    return html("problem.html", exc.status, headers, title=exc.title, detail=exc.detail)


def _seconds(since: datetime | None) -> float:
    """By this host's clock: the database's cannot be asked."""
    return 0.0 if since is None else (datetime.now(timezone.utc) - since).total_seconds()


def refusal(exc: HTTPException) -> Response:
    """An error that Flask raises itself, such as 413."""
    return html("problem.html", exc.code or 500, title=f"{exc.name}.", detail=None)


def link(path: str, **values: Any) -> str:
    """The address of a page with these parameters, without those that are empty."""
    query = urlencode({name: value for name, value in values.items() if value not in (None, "")})
    return f"{path}?{query}" if query else path


def parameter(name: str) -> str:
    """A parameter of the query; empty without it. What is no text in the database is found nowhere."""
    return request.args.get(name, "").replace("\0", "\ufffd")


def static_url(name: str) -> str:
    return f"/static/{DIGESTS[name]}/{name}"


@bp.get("/static/<digest>/<name>")
def static(digest: str, name: str) -> Response:
    """With another version's digest it is still this version's file: any instance may be asked in an update."""
    if name not in FILES:
        raise errors.NotFound("There is no such file.")
    caching = FOREVER if digest == DIGESTS[name] else NO_STORE
    return Response(FILES[name], headers={**HEADERS, **caching}, content_type=KINDS[Path(name).suffix])


@bp.get("/favicon.ico")
def icon() -> Response:
    """Browsers ask for it when they show an answer in JSON."""
    return static(DIGESTS["icon.svg"], "icon.svg")


def span(seconds: float) -> str:
    """A length of time in its two largest units: 42 s, 3 min, 2 h 5 min, 3 d 4 h."""
    whole = round(abs(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole < 600 and whole % 60 else "")
    if whole < 86400:
        return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 >= 60 else "")
    return f"{whole // 86400} d" + (f" {whole % 86400 // 3600} h" if whole % 86400 >= 3600 else "")


def moment(time: datetime, now: datetime | None = None) -> str:
    """A time in UTC; with its day, unless that is today."""
    utc = time.astimezone(timezone.utc)
    today = (now or datetime.now(timezone.utc)).astimezone(timezone.utc).date()
    return f"{utc:%H:%M:%S}" if utc.date() == today else f"{utc:%Y-%m-%d %H:%M}"


def number(value: float, most: int | None = None) -> str:
    """A count with its thousands apart; from `most` on, where counting stops, "and more"."""
    return f"{most:,}+" if most is not None and value >= most else f"{value:,}"


def said(changes: Mapping[str, msgspec.Raw]) -> list[tuple[str, str]]:
    """The fields of an event that tell something, with their values as JSON."""
    texts = [(name, bytes(value).decode()) for name, value in changes.items() if name not in SILENT]
    return [(name, text) for name, text in texts if text not in ("null", '""', "[]", "{}")]


def address(instance: instances.InstanceRow) -> str:
    """How an operator knows an instance: by host and port."""
    return f"{instance.hostname}:{instance.metadata.get('port', '?')}"


_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("loom.page"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_environment.globals |= {
    "static": static_url,
    "link": link,
    "navigation": NAVIGATION,
    "version": __version__,
}
_environment.filters |= {"span": span, "moment": moment, "number": number, "address": address, "said": said}
