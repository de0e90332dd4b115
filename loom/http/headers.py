"""What the headers of a request say: who writes, under which locks, and under which conditions."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from flask import request

from loom import errors, instances
from loom.http.parse import MAX_TOKEN, check_name, plain, utf8
from loom.http.settings import settings
from loom.state.entities import Conditions, Versions
from loom.state.writer import Writer

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")  # as nginx takes it from a client
_FENCE = r'\s*([1-9][0-9]{0,15})\s*(?:;\s*lock\s*=\s*("[^"]*")\s*)?'
_FENCES = re.compile(f"{_FENCE}(?:,{_FENCE})*")

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_VERSION = re.compile("[1-9][0-9]{0,17}", re.ASCII)


def writer(own: str | None, actor: str | None = None) -> Writer:
    """Who writes, from the request's headers, and the grants that it presents.

    `own`: the lock that a bare number in Loom-Lock-Token means, if there is one.
    `actor`: who it is when Loom-Actor does not say.
    Raises Invalid, which names the header.
    """
    headers = request.environ
    named, fences = headers.get("HTTP_LOOM_ACTOR"), headers.get("HTTP_LOOM_LOCK_TOKEN")
    return Writer(
        settings(),
        actor=actor if named is None else plain(utf8(named.encode("latin-1"), "Loom-Actor"), "Loom-Actor"),
        instance_id=instances.own_id(),
        request_id=_request_id("HTTP_X_REQUEST_ID"),
        proxy_request_id=_request_id("HTTP_LOOM_PROXY_REQUEST_ID"),
        fences={} if fences is None else _fences(fences, own),
    )


def conditions() -> Conditions:
    """If-Match and If-None-Match (RFC 9110, section 13) of a request for one entity. Raises Invalid."""
    return Conditions(_versions("If-Match"), _versions("If-None-Match"))


def no_conditions() -> None:
    """For what concerns several entities at once: a condition is refused, since ignoring it would overwrite.

    Raises Invalid.
    """
    for header in ("If-Match", "If-None-Match"):
        if _versions(header) is not None:
            raise errors.Invalid.field(header, "can only be met by one entity: this request is for several")


def _versions(header: str) -> Versions | None:
    """The versions in a list of ETags, or `*`; None without the header. Raises Invalid.

    Weak tags count as strong ones, also in If-Match: nginx makes them weak when it compresses an answer.
    """
    text = request.headers.get(header)
    if text is None:
        return None
    if text.strip(" \t") == "*":
        return "*"
    if not _TAGS.fullmatch(text):
        raise errors.Invalid.field(header, 'must be ETags in their quotes, such as "3", separated by commas; or *')
    # 0 is no entity's version: a tag that Loom has not made.
    return [int(tag) if _VERSION.fullmatch(tag) else 0 for tag in re.findall('"([^"]*)"', text)]


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
