"""Request input: turns bodies into checked Structs, query parameters and names into checked values; or answers 400."""

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
_IN_PATH = r"^(?!\.{1,2}$)[^\x00-\x1f\x7f-\x9f/\ufffd]+$(?!\n)"  # in Python, $ also matches before a final \n
Key = Annotated[str, Meta(min_length=1, max_length=200, pattern=_IN_PATH)]
Prefix = Annotated[str, Meta(min_length=1, max_length=100, pattern=_IN_PATH)]  # of a Key
Reference = Annotated[str, Meta(max_length=200)] | UnsetType | None  # to an optional entity; "" means none
Keys = Annotated[list[Key], Meta(max_length=1000)]
Tags = Annotated[list[Annotated[str, Meta(max_length=255)]], Meta(max_length=1000)]
Count = Annotated[int, Meta(ge=0, le=MAX_TOKEN)]
MAX_NAME = 1000
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Actor = Annotated[str, Meta(max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$(?!\n)")]

PAGE = ("limit", "after")  # the parameters of every list that has pages
MAX_ROWS = 10_000
MAX_DEPTH = 100  # levels of nested JSON
# The greatest number that fits into a double. 64 bits would not do: PostgreSQL returns 1e19 as an integer, and a value
# that was answered must be accepted again. answerable() in schema.sql has the same bound.
MAX_NUMBER = 17976931348623158 * 10**292
MAX_PATH = 2000  # bytes of a file's path; percent-encoded and with a project, it still fits into a request line
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PATH = re.compile(r"^(?P<problem>.*?)(?: - at `\$\.?(?P<field>.*)`)?$", re.DOTALL)


class NameConverter(BaseConverter):
    """Passes every name to its view, so that a bad name is refused there, and not redirected to another name."""

    regex = r"(?s:.*)"
    part_isolating = False


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """A request body that refuses unknown keys."""


def prepare(kind: type[msgspec.Struct] = msgspec.Struct) -> None:
    """Makes msgspec inspect each Struct before there are threads.

    msgspec inspects a Struct at its first use. If two threads use one for the first time together, the process crashes
    (msgspec 0.22: the second thread reads what the first is still building).
    """
    for struct in kind.__subclasses__():
        if struct.__module__.split(".")[0] != "msgspec":
            msgspec.json.Decoder(struct)
        prepare(struct)


def body(kind: type[S], known: Collection[str] | None = None, required: Collection[str] = ()) -> S:
    """The request's body as a `kind`; no body equals {}. Raises Invalid, which names the field, and TooLarge.

    known: if given, all other keys are refused. required: the keys that must be there and not empty.
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
        raise too_large()  # Werkzeug cuts a chunked body off at the limit
    return found


def missing(field: str) -> errors.Invalid:
    return errors.Invalid.field(field, "is required")


def too_large() -> errors.TooLarge:
    return errors.TooLarge(f"A body may have up to {(request.max_content_length or 0) // MIB} MiB.")


def _invalid(text: str, kind: type) -> errors.Invalid:
    """From msgspec's "Expected `int`, got `str` - at `$.ttl_seconds`"; the text names an unknown field itself."""
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
    """The allowed values of each Literal field of a Struct, or of a Struct in one of its lists."""
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
    """The object of these pairs. Raises Invalid for a NUL character, a number beyond a double, or a key given twice.

    JSON allows these, but PostgreSQL or a reader of the answer does not.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        raise errors.Invalid.field(shown(next(key for key in times if times[key] > 1)), "is given twice")
    for key, value in pairs:
        wrong = flaw(key) or flaw(value)
        if wrong:
            raise errors.Invalid.field(shown(key), wrong)
    return found


def shown(key: str) -> str:
    """A client's key, escaped and shortened for a message of one line."""
    return json.dumps(key, ensure_ascii=False)[1:-1][:200]


def flaw(value: Any) -> str | None:
    """What is wrong with a value that is not an object, or None; see `object_of`."""
    if isinstance(value, list):
        return next(filter(None, map(flaw, value)), None)
    if isinstance(value, str) and "\x00" in value:
        return "holds a NUL character"
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return "holds a number beyond 1.797e308"
    return None


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a value is nested deeper than that. Merging is recursive, also in PostgreSQL, and must be bounded."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inside)


def integer_of(text: str) -> int:
    """Like int(), at a bounded cost: a number of 311 characters is already beyond MAX_NUMBER."""
    return int(text[:311])


def query(*names: str) -> Callable[[View], View]:
    """Marks a view with the query parameters that it reads; a view without the mark reads none."""

    def mark(view: View) -> View:
        view.query = frozenset(names)  # type: ignore[attr-defined]
        return view

    return mark


def check_query(view: Callable[..., Any]) -> None:
    """Raises Invalid for a parameter that the view does not read, or that is given twice.

    Otherwise a misspelt filter would answer everything, and of two values only the first would count.
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
    """A file's path without empty parts and `.`, since two spellings would be two locks. Raises Invalid."""
    parts = [part for part in value.split("/") if part not in ("", ".")]
    if not parts or len(value.encode()) > MAX_PATH or _CONTROL.search(value):
        raise errors.Invalid.field("file_path", f"must name a file in at most {MAX_PATH} bytes, no control characters")
    if ".." in parts:
        raise errors.Invalid.field("file_path", "must not hold .. between slashes")
    return "/" * value.startswith("/") + "/".join(parts)


def key(value: str) -> str:
    """An entity's id from the path. Raises Invalid for a malformed one."""
    if "\ufffd" in value:
        raise errors.Invalid.field("id", "is not UTF-8")
    return plain(value, "id", most=200)


def cursor(kind: type[T], name: str = "after") -> T | None:
    """The cursor in the query, decoded to a `kind`, or None. Raises Invalid."""
    value = request.args.get(name)
    if value is None:
        return None
    try:
        found = msgspec.json.decode(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)), type=kind)
        if not _CONTROL.search(str(found)):
            return found
    except (msgspec.DecodeError, ValueError):
        pass
    raise errors.Invalid.field(name, "is not a cursor that Loom returned")


def encode_cursor(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def utf8(raw: bytes, field: str) -> str:
    """Decodes UTF-8. Raises Invalid for broken UTF-8: replacement characters would make two names equal."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise errors.Invalid.field(field, "is not UTF-8") from None


def plain(value: str, field: str, least: int = 1, most: int = 255) -> str:
    """The text itself. Raises Invalid for a wrong length or a control character."""
    if not least <= len(value) <= most or _CONTROL.search(value):
        raise errors.Invalid.field(field, f"must have {least} to {most} characters and no control characters")
    return value
