"""Request headers: who writes, which locks fence the write, and which conditions must be met."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from flask import request

from loom import errors, instances
from loom.http.parse import MAX_TOKEN, check_name, plain, utf8
from loom.http.settings import settings
from loom.state.entities import Conditions, Versions
from loom.state.writer import Writer

REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")  # as nginx accepts it from a client
_FENCE = r'\s*([1-9][0-9]{0,15})\s*(?:;\s*lock\s*=\s*("[^"]*")\s*)?'
_FENCES = re.compile(f"{_FENCE}(?:,{_FENCE})*")

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_VERSION = re.compile("[1-9][0-9]{0,17}", re.ASCII)


def writer(own: str | None, actor: str | None = None) -> Writer:
    """The writer that the request's headers describe, with the fencing tokens that it presents.

    `own`: the lock that a bare number in Loom-Lock-Token refers to, if any.
    `actor`: the actor if there is no Loom-Actor header.
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
    """Refuses conditions on a request for several entities: to ignore one could overwrite a newer version.

    Raises Invalid.
    """
    for header in ("If-Match", "If-None-Match"):
        if _versions(header) is not None:
            raise errors.Invalid.field(header, "applies to one entity, but this request is for several")


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
    # 0, which no entity has as its version, stands for a tag that Loom did not make.
    return [int(tag) if _VERSION.fullmatch(tag) else 0 for tag in re.findall('"([^"]*)"', text)]


def _request_id(header: str) -> str | None:
    """The id in that header, or None if it is absent or malformed."""
    value = request.environ.get(header, "")
    return value if REQUEST_ID.fullmatch(value) else None


def _fences(text: str, own: str | None) -> dict[str, int]:
    """Token by lock name, from `17` and `17; lock="NAME%20ENCODED"`, separated by commas."""
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
                field, 'must name the lock: NUMBER; lock="NAME". This request has no lock of its own'
            )
        if name.startswith("loom:"):  # a fence would keep the lock's row locked
            raise errors.Invalid.field(field, f"must not name {name}, which is Loom's own")
        if found.setdefault(name, token) != token:
            raise errors.Invalid.field(field, f"has two tokens for {name}")
    return found
