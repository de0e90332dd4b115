"""Request input: turns bodies into checked Structs, query parameters and names into checked values; or answers 400."""

from __future__ import annotations

import base64
import functools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from datetime import datetime, timezone
from typing import Annotated, Any, TypeVar, get_args

import msgspec
import msgspec.inspect
from flask import request
from msgspec import Meta, UnsetType
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter

from loom import errors
from loom.bounds import MIB, bounds
from loom.http.values import Pairs, count, first_flaw, integer_of, is_deeper, object_of, shown

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)
View = TypeVar("View", bound=Callable[..., Any])

MAX_TOKEN = 2**53 - 1

Token = Annotated[int, Meta(ge=1, le=MAX_TOKEN)]
_IN_PATH = r"^(?!\.{1,2}$)[^\x00-\x1f\x7f-\x9f/\ufffd]+$(?!\n)"  # in Python, $ also matches before a final \n
Key = Annotated[str, Meta(min_length=1, max_length=200, pattern=_IN_PATH)]
Prefix = Annotated[str, Meta(min_length=1, max_length=100, pattern=_IN_PATH)]  # of a Key
Reference = Annotated[str, Meta(max_length=200)] | UnsetType | None  # to an optional entity; "" means none
Keys = Annotated[list[Key], Meta(max_length=bounds.references)]
Tags = Annotated[list[Annotated[str, Meta(max_length=255)]], Meta(max_length=bounds.references)]
Count = Annotated[int, Meta(ge=0, le=MAX_TOKEN)]
MAX_NAME = 1000
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Actor = Annotated[str, Meta(max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$(?!\n)")]

PAGE = ("limit", "after")  # the parameters of every list that has pages
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
    Where unknown keys are ignored, as in the original's routes, null is no value for a key that cannot be null.
    """
    text = raw() or b"{}"
    if count(text, bounds.values) > bounds.values:
        raise errors.TooLarge(f"A body may have up to {bounds.values} values.")
    try:
        lenient = b"null" in text and known is None and not kind.__struct_config__.forbid_unknown_fields
        value = msgspec.json.decode(_without_nulls(text, kind) if lenient else text, type=kind)
        found = json.loads(text, object_pairs_hook=object_of, parse_int=integer_of)
    except msgspec.ValidationError as exc:
        raise _invalid(str(exc), kind, text) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise errors.Invalid("The body is not valid JSON.", error="Invalid request body") from None
    except errors.Invalid as exc:
        pairs = json.loads(text, object_pairs_hook=Pairs, parse_int=integer_of)
        raise first_flaw(pairs, "") or exc from None
    for key in found:
        if known is not None and key not in known:
            raise errors.Invalid.field(key, "is not a known field", allowed=sorted(known))
        if key in kind.__struct_fields__ and is_deeper(found[key], bounds.depth):
            raise errors.Invalid.field(key, f"is nested deeper than {bounds.depth} levels")
    absent = [key for key in required if not getattr(value, key)]
    if absent:
        raise missing(*absent)
    return value


def _without_nulls(text: bytes, kind: type[msgspec.Struct]) -> bytes:
    """A JSON object without those fields that are null and cannot be."""
    fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    strict = {f.encode_name for f in msgspec.structs.fields(kind) if type(None) not in get_args(f.type)}
    if not any(bytes(fields[name]) == b"null" for name in strict & fields.keys()):
        return text
    return msgspec.json.encode({k: v for k, v in fields.items() if k not in strict or bytes(v) != b"null"})


def raw() -> bytes:
    """The request's body. Raises TooLarge, Compressed, Stalled, Invalid."""
    if request.environ.get("HTTP_CONTENT_ENCODING", "identity").lower() != "identity":
        raise errors.Compressed("Send the body without Content-Encoding.")
    try:
        found = request.get_data()
    except HTTPException:
        raise
    except BlockingIOError:
        raise errors.Stalled() from None
    except Exception:  # of the server's own parser, such as gunicorn's InvalidChunkSize
        raise errors.Invalid(
            "The body ends early, or its chunks are malformed.", error="Invalid request body"
        ) from None
    if request.content_length is None and len(found) >= (request.max_content_length or math.inf):
        raise too_large()  # Werkzeug cuts a chunked body off at the limit
    return found


def missing(*fields: str) -> errors.Invalid:
    """All of these fields are required, and absent or empty."""
    text = "; ".join(f"{field}: is required" for field in fields)
    return errors.Invalid(text, errors=[{"field": field, "problem": "is required"} for field in fields])


def too_large() -> errors.TooLarge:
    return errors.TooLarge(f"A body may have up to {(request.max_content_length or 0) // MIB} MiB.")


def _invalid(text: str, kind: type, body: bytes) -> errors.Invalid:
    """From msgspec's "Expected `int`, got `str` - at `$.ttl_seconds`"; the text names an unknown field itself."""
    match = _PATH.match(text)
    assert match is not None
    problem, field = match["problem"], match["field"] or ""
    if "required field" in problem:
        return missing(*_absent(kind, json.loads(body)))
    named = re.search(r"unknown field `([^`]*)`", problem)
    if named:
        field = f"{field}.{named[1]}" if field else named[1]
    if "[...]" in field:
        found = first_flaw(json.loads(body, object_pairs_hook=Pairs, parse_int=integer_of), "")
        if found is not None:
            return found
        field = field.replace("[...]", "." + _wrong_key(kind, field.partition("[")[0], json.loads(body)), 1)
    few = allowed(kind).get(re.sub(r"\[\d+\]", "[]", field))
    return errors.Invalid.field(field or "body", problem[:1].lower() + problem[1:], allowed=few)


def _wrong_key(kind: type, field: str, value: dict[str, Any]) -> str:
    """The first key of the object in this field whose value does not fit."""
    (hint,) = (f.type for f in msgspec.structs.fields(kind) if f.encode_name == field)
    for key, inside in value[field].items():
        try:
            msgspec.convert({key: inside}, hint)
        except msgspec.ValidationError:
            return shown(key)
    return "..."


def _absent(kind: type, value: Any, path: str = "") -> Iterator[str]:
    """The required fields that a value does not have as a Struct, and in its lists of Structs."""
    for field in msgspec.inspect.type_info(kind).fields if isinstance(value, dict) else ():  # type: ignore[attr-defined]
        given = value.get(field.encode_name)
        if given is None and field.required:
            yield path + field.encode_name
        items = getattr(field.type, "item_type", None)
        if isinstance(items, msgspec.inspect.StructType) and isinstance(given, list):
            for n, each in enumerate(given):
                yield from _absent(items.cls, each, f"{path}{field.encode_name}[{n}].")


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


def choice(name: str, allowed: Collection[str]) -> str | None:
    """One of a few values of the query, or None."""
    value = request.args.get(name)
    if value not in (None, *allowed):
        raise errors.Invalid.field(name, f"must be among {', '.join(allowed)}", allowed=list(allowed))
    return value


def text(name: str, most: int = 255) -> str | None:
    """A text of the query, or None."""
    value = request.args.get(name)
    return None if value is None else plain(value, name, least=0, most=most)


def moment(name: str) -> datetime | None:
    """A time of the query, or None. Raises Invalid for one that is not RFC 3339."""
    value = text(name)
    if value is None:
        return None
    try:
        return msgspec.convert(value, Annotated[datetime, Meta(tz=True)]).astimezone(timezone.utc)
    except (msgspec.ValidationError, OverflowError):
        raise errors.Invalid.field(name, "must be a time as in RFC 3339, such as 2026-11-30T22:00:00Z") from None


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
    return one_form(name, field)


def one_form(name: str, field: str) -> str:
    """The name of something new, if it is in Unicode's form NFC: one name must not have two forms. Raises Invalid."""
    if not unicodedata.is_normalized("NFC", name):
        raise errors.Invalid.field(field, "must be in Unicode's form NFC")
    return name


def file_path(value: str) -> str:
    """A file's path in NFC without empty parts and `.`, since two spellings would be two locks. Raises Invalid."""
    value = unicodedata.normalize("NFC", value)
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
