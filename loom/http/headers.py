"""What the headers of a write say: who writes, and under which locks."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from flask import request

from loom import errors, instances
from loom.http.parse import MAX_TOKEN, check_name, plain, utf8
from loom.state.writer import Writer

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")  # as nginx takes it from a client
_FENCE = r'\s*([1-9][0-9]{0,15})\s*(?:;\s*lock\s*=\s*("[^"]*")\s*)?'
_FENCES = re.compile(f"{_FENCE}(?:,{_FENCE})*")


def writer(own: str | None, actor: str | None = None) -> Writer:
    """Who writes, from the request's headers, and the grants that it presents.

    `own`: the lock that a bare number in Loom-Lock-Token means, if there is one.
    `actor`: who it is when Loom-Actor does not say.
    Raises Invalid, which names the header.
    """
    headers = request.environ
    named, fences = headers.get("HTTP_LOOM_ACTOR"), headers.get("HTTP_LOOM_LOCK_TOKEN")
    return Writer(
        actor=actor if named is None else plain(utf8(named.encode("latin-1"), "Loom-Actor"), "Loom-Actor"),
        instance_id=instances.own_id(),
        request_id=_request_id("HTTP_X_REQUEST_ID"),
        proxy_request_id=_request_id("HTTP_LOOM_PROXY_REQUEST_ID"),
        fences={} if fences is None else _fences(fences, own),
    )


def _request_id(header: str) -> str | None:
    """An id from that header, or None when it is no sane one."""
    value = request.environ.get(header, "")
    return value if _REQUEST_ID.fullmatch(value) else None


def _fences(text: str, own: str | None) -> dict[str, int]:
    """From `17` and `17; lock="NAME%20ENCODED"`, separated by commas."""
    found: dict[str, int] = {}
    field = "Loom-Lock-Token"
    form = 'must be NUMBER or NUMBER; lock="NAME", the name percent-encoded; several separated by commas'
    if not _FENCES.fullmatch(text):
        raise errors.Invalid.field(field, form)
    for number, quoted in re.findall(_FENCE, text):
        token, name = int(number), own
        if token > MAX_TOKEN:
            raise errors.Invalid.field(field, form)
        if quoted:
            name = check_name(utf8(unquote_to_bytes(quoted[1:-1].encode("latin-1")), field), field)
        if name is None:
            raise errors.Invalid.field(
                field, 'must name the lock: NUMBER; lock="NAME". This request has none of its own'
            )
        if found.setdefault(name, token) != token:
            raise errors.Invalid.field(field, f"has two tokens for {name}")
    return found
