"""Requests that a page of another origin makes a browser send: writes are refused, and so are names that are not ours.

Without asking, a page may send a `text/plain` POST to any address that its reader's browser reaches. It may also let
its own name lead to that address (DNS rebinding); then the browser takes Loom for a part of the page.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Mapping
from typing import Any

from flask import Response

from loom import errors
from loom.config import Config

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
UNCHECKED = ("/health", "/api/v1/health")  # monitors ask by any name, and learn nothing that a page could use
METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, Loom-Actor, Loom-Lock-Token, Prefer,"
    " X-API-Key, X-Request-ID"
)
EXPOSED = "ETag, Idempotency-Replayed, Link, Retry-After, X-Request-ID"
PREFLIGHT_SECONDS = "600"  # for which a browser need not ask again


def check(environ: Mapping[str, Any], config: Config) -> None:
    """Raises Forbidden for a write that another origin's page has caused."""
    if environ["REQUEST_METHOD"] in SAFE:
        return
    origin, site = environ.get("HTTP_ORIGIN"), environ.get("HTTP_SEC_FETCH_SITE")
    if origin is None and site is None:  # no browser, or one that says nothing, which no current one does for a write
        return
    if origin is not None and origin in config.security.allowed_origins:
        return
    if origin is not None and not _same(origin, environ.get("HTTP_HOST", "")):
        raise errors.Forbidden(f"Pages of {_shown(origin)} may not write: security.allowed_origins does not list it.")
    if site not in (None, "same-origin", "none"):
        raise errors.Forbidden("A page of another site may not write.")


def check_host(environ: Mapping[str, Any], config: Config) -> None:
    """Raises Misdirected unless the Host is an address, localhost, or listed. For requests without a key."""
    host = environ.get("HTTP_HOST")
    if host is None or _is_ours(host, config.server.allowed_hosts) or environ["PATH_INFO"].startswith(UNCHECKED):
        return
    raise errors.Misdirected(f"Add {_shown(host)} to server.allowed_hosts, use an IP address, or send a key.")


def add_headers(response: Response, environ: Mapping[str, Any], config: Config) -> None:
    """Lets pages of the allowed origins read the answer (CORS)."""
    allowed = config.security.allowed_origins
    if not allowed:
        return
    response.headers.add("Vary", "Origin")
    origin = environ.get("HTTP_ORIGIN")
    if origin not in allowed:
        return
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Access-Control-Expose-Headers"] = EXPOSED
    if environ["REQUEST_METHOD"] == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ:
        response.headers["Access-Control-Allow-Methods"] = METHODS
        response.headers["Access-Control-Allow-Headers"] = HEADERS
        response.headers["Access-Control-Max-Age"] = PREFLIGHT_SECONDS


def _same(origin: str, host: str) -> bool:
    """Whether an origin has this host and port. Its scheme may differ: a proxy may have ended TLS."""
    scheme, _, rest = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    return port is not None and rest.removesuffix(port) == host.lower().removesuffix(port)


@functools.lru_cache(1024)
def _is_ours(host: str, allowed: tuple[str, ...]) -> bool:
    name = _without_port(host.lower())
    if name == "localhost" or name in map(str.lower, allowed):
        return True
    try:
        return bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and not name.endswith(":") else host


def _shown(text: str) -> str:
    return ascii(text[:100])[1:-1]
