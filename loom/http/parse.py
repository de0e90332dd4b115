"""What comes in: bodies become checked Structs, query parameters and names checked values. All else is a 400."""

from __future__ import annotations

import base64
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Annotated, Any, TypeVar

import msgspec
import msgspec.inspect
from flask import request
from msgspec import Meta, UnsetType
from werkzeug.routing import BaseConverter

from loom import errors

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
View = TypeVar("View", bound=Callable[..., Any])

MAX_TOKEN = 2**53 - 1
MIB = 1024 * 1024

Token = Annotated[int, Meta(ge=1, le=MAX_TOKEN)]
_IN_PATH = r"^(?!\.{1,2}$)[^\x00-\x1f\x7f-\x9f/\ufffd]+$(?!\n)"  # in Python, $ comes before a last \n too
Key = Annotated[str, Meta(min_length=1, max_length=200, pattern=_IN_PATH)]
Prefix = Annotated[str, Meta(min_length=1, max_length=100, pattern=_IN_PATH)]  # of a Key
Reference = Annotated[str, Meta(max_length=200)] | UnsetType | None  # to what may be absent; empty is none
Keys = Annotated[list[Key], Meta(max_length=1000)]
Tags = Annotated[list[Annotated[str, Meta(max_length=255)]], Meta(max_length=1000)]
Count = Annotated[int, Meta(ge=0, le=MAX_TOKEN)]
MAX_NAME = 1000
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Actor = Annotated[str, Meta(max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$(?!\n)")]

PAGE = ("limit", "after")  # the parameters of every list that has pages
MAX_ROWS = 10_000
MAX_DEPTH = 100  # of JSON in JSON
# The greatest number that a reader with doubles only can take. Not 64 bits: PostgreSQL gives 1e19 back as an integer,
# and what is answered must be accepted again. answerable() in schema.sql has the same bound.
MAX_NUMBER = 17976931348623158 * 10**292
MAX_PATH = 2000  # bytes of a file's; percent-encoded, with a project, they still fit into a request line
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PATH = re.compile(r"^(?P<problem>.*?)(?: - at `\$\.?(?P<field>.*)`)?$", re.DOTALL)


class NameConverter(BaseConverter):
    """Lets every name reach its view, so that a bad one is refused there, and never redirected to another."""

    regex = r"(?s:.*)"
    part_isolating = False


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """A request body; keys that it does not know are refused."""


def prepare(kind: type[msgspec.Struct] = msgspec.Struct) -> None:
    """Has msgspec look at every Struct there is, before there are threads.

    It does so at a Struct's first use, and two threads that use one for the first time at once crash the process
    (msgspec 0.22: the second reads what the first is still building).
    """
    for struct in kind.__subclasses__():
        if struct.__module__.split(".")[0] != "msgspec":
            msgspec.json.Decoder(struct)
        prepare(struct)


def body(kind: type[S], known: Collection[str] | None = None, required: Collection[str] = ()) -> S:
    """The request's body as a `kind`; no body equals {}. Raises Invalid, which names the field, and TooLarge.

    known: the keys that it may have, where the `kind` itself ignores others. required: those that may not be empty.
    """
    text = raw() or b"{}"
    try:
        value = msgspec.json.decode(text, type=kind)
        found = json.loads(text, object_pairs_hook=object_of, parse_int=integer_of)
    except msgspec.ValidationError as exc:
        raise _invalid(str(exc), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise errors.Invalid("The body is not valid JSON.", error="Invalid request body") from None
    for key in found:
        if known is not None and key not in known:
            raise errors.Invalid.field(key, "is not a known field", allowed=sorted(known))
        if key in kind.__struct_fields__ and _is_deeper(found[key], MAX_DEPTH):
            raise errors.Invalid.field(key, f"is nested deeper than {MAX_DEPTH} levels")
    for key in required:
        if not getattr(value, key):
            raise missing(key)
    return value


def raw() -> bytes:
    """The request's body. Raises TooLarge."""
    found = request.get_data()
    if request.content_length is None and len(found) >= (request.max_content_length or math.inf):
        raise too_large()  # in chunks it is cut off there
    return found


def missing(field: str) -> errors.Invalid:
    return errors.Invalid.field(field, "is required")


def too_large() -> errors.TooLarge:
    return errors.TooLarge(f"A body may have {(request.max_content_length or 0) // MIB} MiB.")


def _invalid(text: str, kind: type) -> errors.Invalid:
    """From msgspec's "Expected `int`, got `str` - at `$.ttl_seconds`"; an unknown field stands in the text itself."""
    match = _PATH.match(text)
    assert match is not None
    problem, field = match["problem"], match["field"] or ""
    named = re.search(r"(?:unknown|required) field `([^`]*)`", problem)
    if named:
        field = f"{field}.{named[1]}" if field else named[1]
    few = allowed(kind).get(re.sub(r"\[\d+\]", "[]", field))
    return errors.Invalid.field(field or "body", problem[:1].lower() + problem[1:], allowed=few)


@functools.cache
def allowed(kind: type) -> dict[str, list[Any]]:
    """The values that a field of a Struct, or of one in its lists, may have, where they are few."""
    found: dict[str, list[Any]] = {}
    for field in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
        for hint in getattr(field.type, "types", (field.type,)):
            if isinstance(hint, msgspec.inspect.LiteralType):
                found.setdefault(field.encode_name, []).extend(hint.values)
            elif isinstance(hint, msgspec.inspect.ListType) and isinstance(hint.item_type, msgspec.inspect.StructType):
                for name, values in allowed(hint.item_type.cls).items():
                    found[f"{field.encode_name}[].{name}"] = values
    return found


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What JSON allows and PostgreSQL or a reader does not: NUL, numbers beyond a double, and one key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        raise errors.Invalid.field(shown(next(key for key in times if times[key] > 1)), "stands there twice")
    for key, value in pairs:
        wrong = flaw(key) or flaw(value)
        if wrong:
            raise errors.Invalid.field(shown(key), wrong)
    return found


def shown(key: str) -> str:
    """A key within a message of one line."""
    return json.dumps(key, ensure_ascii=False)[1:-1][:200]


def flaw(value: Any) -> str | None:
    """What is wrong with a value that is no object: see `object_of`."""
    if isinstance(value, list):
        return next(filter(None, map(flaw, value)), None)
    if isinstance(value, str) and "\x00" in value:
        return "holds a NUL character"
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return "holds a number beyond 1.797e308"
    return None


def _is_deeper(value: Any, levels: int) -> bool:
    """Merging is recursive, in PostgreSQL too."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inside)


def integer_of(text: str) -> int:
    """As int(), at a bounded cost: 311 characters are beyond MAX_NUMBER already."""
    return int(text[:311])


def query(*names: str) -> Callable[[View], View]:
    """Marks a view with the query parameters that it reads; a view without the mark reads none."""

    def mark(view: View) -> View:
        view.query = frozenset(names)  # type: ignore[attr-defined]
        return view

    return mark


def check_query(view: Callable[..., Any]) -> None:
    """Raises Invalid for a parameter that the view does not read, and for one that is given twice.

    A misspelt filter would else answer everything, and of two values only the first would count.
    """
    known: frozenset[str] = getattr(view, "query", frozenset())
    for name, values in request.args.lists():
        if name not in known:
            raise errors.Invalid.field(shown(name), "is not a known parameter", allowed=sorted(known))
        if len(values) > 1:
            raise errors.Invalid.field(name, "is given twice", allowed=sorted(known))


def integer(name: str, *, least: int = 1, most: int, default: int | None = None) -> int:
    """An integer of the query. Raises Invalid when it is missing (and has no default), no integer, or out of range."""
    text = request.args.get(name)
    if text is None:
        if default is None:
            raise missing(name)
        return default
    if not re.fullmatch(r"-?[0-9]{1,19}", text, re.ASCII) or not least <= int(text) <= most:
        raise errors.Invalid.field(name, f"must be an integer from {least} to {most}")
    return int(text)


def flag(name: str) -> bool:
    """A true or false of the query, false by default."""
    text = request.args.get(name, "false")
    if text not in ("true", "false"):
        raise errors.Invalid.field(name, "must be true or false", allowed=["true", "false"])
    return text == "true"


def text(name: str, most: int = 255) -> str | None:
    """A text of the query, or None."""
    value = request.args.get(name)
    return None if value is None else plain(value, name, least=0, most=most)


def lock_name() -> str:
    """The name in the path. Raises Invalid."""
    return check_name(raw_path("/api/v1/locks/", "lock_name"))


def raw_path(prefix: str, field: str) -> str:
    """The path behind the prefix. Raises Invalid."""
    return utf8(request.environ["PATH_INFO"].encode("latin-1")[len(prefix) :], field)


def check_name(name: str, field: str = "lock_name") -> str:
    """A lock's name, if it is one. Raises Invalid."""
    if not 1 <= len(name) <= 255:
        raise errors.Invalid.field(field, "must have 1 to 255 characters")
    if _CONTROL.search(name):
        raise errors.Invalid.field(field, "must not hold control characters")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise errors.Invalid.field(field, "must not hold an empty part, . or .. between slashes")
    return name


def file_path(value: str) -> str:
    """One spelling of a file's path, without empty parts and `.`: two would be two locks. Raises Invalid."""
    parts = [part for part in value.split("/") if part not in ("", ".")]
    if not parts or len(value.encode()) > MAX_PATH or _CONTROL.search(value):
        raise errors.Invalid.field("file_path", f"must name a file in at most {MAX_PATH} bytes, no control characters")
    if ".." in parts:
        raise errors.Invalid.field("file_path", "must not hold .. between slashes")
    return "/" * value.startswith("/") + "/".join(parts)


def key(value: str) -> str:
    """An entity's id from the path. Raises Invalid for what can't be one."""
    if "\ufffd" in value:
        raise errors.Invalid.field("id", "is not UTF-8")
    return plain(value, "id", most=200)


def cursor(kind: type[T], name: str = "after") -> T | None:
    """What `encode_cursor` made of a `kind`, from the query, or None. Raises Invalid."""
    value = request.args.get(name)
    if value is None:
        return None
    try:
        found = msgspec.json.decode(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)), type=kind)
        if not _CONTROL.search(str(found)):
            return found
    except (msgspec.DecodeError, ValueError):
        pass
    raise errors.Invalid.field(name, "is not a cursor that Loom gave")


def encode_cursor(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def utf8(raw: bytes, field: str) -> str:
    """What WSGI gave as Latin-1, from its bytes: broken UTF-8 is refused, never replaced, or two would be one.

    Raises Invalid.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise errors.Invalid.field(field, "is not UTF-8") from None


def plain(value: str, field: str, least: int = 1, most: int = 255) -> str:
    """A text, if it is as long as it may be and holds no control characters. Raises Invalid."""
    if not least <= len(value) <= most or _CONTROL.search(value):
        raise errors.Invalid.field(field, f"must have {least} to {most} characters and no control characters")
    return value
