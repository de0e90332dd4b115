"""Who makes a request: found out once, before anything else, and whether its route is for them."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Mapping
from typing import Any, NamedTuple

from flask import Request, request

from loom import errors, instances
from loom.config import Config, is_loopback
from loom.http import origins, parse, permissions
from loom.http.permissions import ADMIN, AGENT, OPEN, RANKS, READER
from loom.state import keys

CALLER = "loom.caller"  # in the environ: the Caller


class Caller(NamedTuple):
    """Who makes a request. `rank`: of permissions.py; `has_key`: whether the request presented a valid key."""

    principal: str
    rank: int
    has_key: bool = False


STRANGER = Caller("", OPEN)
LOCAL = Caller("local", ADMIN)  # with auth: local, whoever is on this host
ANYBODY = Caller("anonymous", ADMIN)  # with auth: off


def admit(request: Request, config: Config) -> None:
    """Notes who makes the request. Raises Unauthorized, Forbidden, Misdirected, and Unavailable.

    What is open to all is answered also without a database, so it asks for no key that this process does not know.
    """
    environ = request.environ
    rule = request.url_rule
    needed = permissions.needed(None if rule is None else rule.rule, environ["REQUEST_METHOD"])
    environ[CALLER] = caller = _identify(environ, config, asks=needed > OPEN)
    if caller.rank < needed and not (needed == READER and _may_scrape(environ, config)):
        if caller.has_key:
            raise errors.Forbidden(f"This needs a key with the role {RANKS[needed]}.")
        raise errors.Unauthorized("Send it as X-API-Key, or as Authorization: Bearer.")
    if not caller.has_key:
        origins.check_host(environ, config)
    origins.check(environ, config)


def caller() -> Caller:
    """Who makes this request."""
    return request.environ.get(CALLER, STRANGER)


def require(rank: int) -> None:
    """For what only some requests of a route need. Raises Forbidden."""
    if caller().rank < rank:
        raise errors.Forbidden(f"This needs a key with the role {RANKS[rank]}.")


def require_reason(reason: str | None) -> None:
    """What is done by force with a key has a reason. Raises Invalid."""
    if caller().has_key and not reason:
        raise parse.missing("reason")


def is_restricted() -> bool:
    """Whether the caller may act only for itself and for agents that it has registered."""
    return caller().rank <= AGENT


def _identify(environ: Mapping[str, Any], config: Config, asks: bool) -> Caller:
    mode = config.security.auth
    if mode == "off":
        return ANYBODY
    presented = _presented(environ)
    if mode == "local" and not (presented or "").startswith(keys.PREFIX) and is_local(environ):
        return LOCAL
    if presented is None:
        return STRANGER
    known = instances.known_keys()
    key = known.find(presented) if asks else known.find_known(presented)
    return STRANGER if key is None else Caller(key.principal, RANKS.index(key.role), True)


def _presented(environ: Mapping[str, Any]) -> str | None:
    key = environ.get("HTTP_X_API_KEY")
    if key is None:
        scheme, _, rest = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        key = rest.strip() if scheme.lower() == "bearer" else None
    return key or None


def is_local(environ: Mapping[str, Any]) -> bool:
    """Whether a request comes from this host: straight, or through a proxy on it that says so by X-Real-IP.

    Some proxies pass on a client's own X-Real-IP, and add only X-Forwarded-For, at its end.
    """
    peer = environ.get("REMOTE_ADDR")
    real, path = environ.get("HTTP_X_REAL_IP"), environ.get("HTTP_X_FORWARDED_FOR")
    if peer and real is None and path is None and "HTTP_FORWARDED" not in environ:
        return _is_loopback(peer)
    if peer is None or (peer and not _is_loopback(peer)) or "HTTP_FORWARDED" in environ:  # "": a Unix socket
        return False
    last = None if path is None else path.rpartition(",")[2].strip()
    return real is not None and _is_loopback(real) and (last is None or _is_loopback(last))


_is_loopback = functools.lru_cache(1024)(is_loopback)


def _may_scrape(environ: Mapping[str, Any], config: Config) -> bool:
    """Whether this is a request for /metrics from an address that needs no key for it."""
    if environ["PATH_INFO"] != "/metrics" or "HTTP_X_FORWARDED_FOR" in environ or "HTTP_FORWARDED" in environ:
        return False
    try:
        peer = ipaddress.ip_address(environ.get("REMOTE_ADDR", ""))
        return any(peer in ipaddress.ip_network(each, strict=False) for each in config.security.metrics_addresses)
    except ValueError:
        return False
