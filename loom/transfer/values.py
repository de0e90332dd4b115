"""Values of a foreign source as PostgreSQL takes them: each is converted exactly, or refused with the reason.

A converter takes what SQLite, YAML or JSON gives and returns a str, or None. It is the text that PostgreSQL itself
would print, so that what is read back can be compared byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Context, Decimal
from json.encoder import encode_basestring
from operator import itemgetter
from pathlib import Path
from typing import Any

from loom.bounds import bounds

Converter = Callable[[Any], "str | None"]

MAX_ID = 200  # characters
MAX_NAME = 1000
MAX_ITEM = 255  # characters of one tag
MAX_INTEGER = 2**63 - 1
MAX_NUMBER = Decimal("1.7976931348623158e308")  # as answerable() in schema.sql
_EXACT = Context(prec=20_000)
_NO_KEY = re.compile(r"[\x00-\x1f\x7f-\x9f/\ufffd]")
_INTEGER = re.compile(r"[+-]?\d{1,30}")
# Go's formats: 2026-01-20 08:00:00.123456789-08:00, ...T...Z, 2026-01-20 08:00:00.1 -0800 PST m=+0.012.
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?)?"
    r"\s*(?:(Z|UTC|[+-]\d\d(?::?\d\d)?)(?: (?:[A-Za-z]{1,6}|[+-]\d\d(?:\d\d)?))?)?(?: m=[+-][\d.]+)?",
    re.ASCII,
)
ZERO_YEAR = 1  # of Go's zero time, 0001-01-01 00:00:00: no time
_TRUE, _FALSE = {"1", "t", "true", "yes", "on"}, {"0", "f", "false", "no", "off"}
_ELEMENT = re.compile(r'[\s"\\{},]|\A\Z|\A(?i:null)\Z')


class Bad(Exception):
    """A value that cannot be taken as it is: the text says why. `instead` is taken in its place."""

    def __init__(self, reason: str, instead: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.instead = reason, instead


def text(value: Any) -> str | None:
    """Any text. What is no text in UTF-8 is replaced by U+FFFD, and reported."""
    if value.__class__ is str:
        if value.isascii() and "\x00" not in value:
            return value
        return _whole(value)
    if value is None:
        return None
    if isinstance(value, bytes):
        return _whole(value.decode("utf-8", "surrogateescape"))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Decimal):
        return str(value)
    raise Bad("is not text", written(value))


def _whole(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Bad("is not UTF-8", repaired(value)) from None
    if "\x00" in value:
        raise Bad("holds a NUL character", repaired(value))
    return value


def repaired(value: str) -> str:
    """With U+FFFD for each byte that is not UTF-8, each half of a character and each NUL."""
    return re.sub("[\ud800-\udfff\x00]", "\ufffd", value)


def name(value: Any) -> str | None:
    """A text that is in an index."""
    found = text(value)
    if found and len(found) > MAX_NAME:
        raise Bad(f"has more than {MAX_NAME} characters")
    return found


def provider(value: Any) -> str | None:
    """Of a request log: null when it used none."""
    return name(value) or None


def key(value: Any) -> str:
    """An id that a path of the HTTP interface can hold."""
    try:
        found = text(value)
    except Bad as bad:
        raise Bad(f"the id {bad.reason}") from None
    if not found:
        raise Bad("has no id")
    if len(found) > MAX_ID or _NO_KEY.search(found) or found in (".", ".."):
        raise Bad(f"the id has more than {MAX_ID} characters, a control character or a slash")
    if not unicodedata.is_normalized("NFC", found):
        raise Bad("the id is not in Unicode's form NFC")
    return found


def reference(value: Any) -> str | None:
    """The id of another row; null when it is empty."""
    return None if value is None or value in ("", b"") else key(value)


def integer(value: Any) -> str | None:
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str) and not _INTEGER.fullmatch(value.strip()):
            raise ValueError
        found = int(value)
        if (not isinstance(value, str) and found != value) or not -MAX_INTEGER - 1 <= found <= MAX_INTEGER:
            raise ValueError
    except (TypeError, ValueError, ArithmeticError):
        raise Bad("is not an integer of 64 bits") from None
    return str(found)


def number(value: Any) -> str | None:
    if value is None or value == "":
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Bad("is not a number") from None
    if not math.isfinite(found):
        raise Bad("is not a finite number")
    return repr(found + 0.0)  # as an integer has it, too


def row_number(value: Any) -> str:
    """A number for the id of a row that is known by no one else: itself, or one made of it."""
    found = text(value)
    if not found:
        raise Bad("has no id")
    whole = _INTEGER.fullmatch(found) and 0 <= int(found) < 2**53
    return str(int(found) if whole else int(hashlib.md5(found.encode(), usedforsecurity=False).hexdigest()[:13], 16))


def cost(value: Any) -> str | None:
    """An amount with ten decimals."""
    found = number(value)
    if found is not None and abs(float(found)) >= 1e9:
        raise Bad("is not below a billion")
    return found and f"{Decimal(found):.10f}"


def small_integer(value: Any) -> str | None:
    """Of 32 bits."""
    found = integer(value)
    if found and abs(int(found)) >= 2**31:
        raise Bad("is not an integer of 32 bits")
    return found


def boolean(value: Any) -> str | None:
    if value is None or value == "":
        return None
    word = str(value).strip().lower()
    if word in _TRUE:
        return "t"
    if word in _FALSE:
        return "f"
    raise Bad("is neither true nor false")


def moment(value: Any) -> str | None:
    """A time in UTC, as PostgreSQL prints it; None for Go's zero time. Without a zone it is UTC."""
    if value is None or value == "":
        return None
    try:
        try:
            found = value if isinstance(value, datetime) else datetime.fromisoformat(value)  # most are ISO 8601
        except (TypeError, ValueError):
            found = _go_time(value)
        if found.tzinfo is not None:
            found = found.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise Bad("is not a time within the years 1 to 9999") from None
    if found.year <= ZERO_YEAR:
        return None
    printed = found.isoformat(" ")
    return (printed[:26].rstrip("0") if found.microsecond else printed[:19]) + "+00"


def _go_time(value: Any) -> datetime:
    match = _TIME.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise Bad("is not a time")
    *numbers, digits, zone = match.groups()
    found = datetime(*(int(number or 0) for number in numbers), int((digits or "")[:6].ljust(6, "0")))  # type: ignore
    return found - _offset(zone) if zone and zone[0] in "+-" else found


def _offset(zone: str) -> timedelta:
    hours, minutes = int(zone[1:3]), int(zone[3:].lstrip(":") or 0)
    if hours > 15 or minutes > 59:
        raise ValueError
    offset = timedelta(hours=hours, minutes=minutes)
    return offset if zone[0] == "+" else -offset


def array(value: Any) -> str | None:
    """A list of texts."""
    if value is None or value == "" or value == []:
        return "{}"
    if isinstance(value, str):
        value = loads(value)
    if value is None:
        return "{}"
    if not isinstance(value, list) or any(isinstance(item, list | dict | type(None)) for item in value):
        raise Bad("is not a list of texts")
    if len(value) > bounds.references:
        raise Bad(f"has more than {bounds.references} items")
    items = [text(item) or "" for item in value]
    if any(len(item) > MAX_ITEM for item in items):
        raise Bad(f"has an item of more than {MAX_ITEM} characters")
    return array_of(items)


def array_of(items: list[str]) -> str:
    """A literal of an array, as PostgreSQL prints it."""
    return "{" + ",".join(_element(item) for item in items) + "}"


def _element(item: str) -> str:
    if _ELEMENT.search(item):
        return '"' + item.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return item


def json_object(value: Any) -> str | None:
    """An object as JSON in one form: sorted keys, plain numbers; whole, in a text or in parts."""
    if value is None or value in ("", "{}") or value == {}:
        return "{}"
    found = loads(value) if isinstance(value, str | bytes) else value
    if found is None:
        return "{}"
    if not isinstance(found, dict):
        raise Bad("is not a JSON object")
    return written(found)


def json_value(value: Any) -> str:
    """Any JSON; a text that is not JSON is itself the value."""
    found = text(value)
    if found is None:
        return "null"
    try:
        return written(loads(found))
    except Bad:
        return written(found)


def loads(value: str | bytes) -> Any:
    try:
        return json.loads(
            value,
            parse_float=_decimal,
            parse_int=_decimal,
            parse_constant=_no_constant,
            object_pairs_hook=object_of,
        )
    except (ValueError, RecursionError, ArithmeticError):
        raise Bad("is not JSON") from None


def _decimal(digits: str) -> Decimal:
    if len(digits) > 400:
        raise ValueError
    return Decimal(digits)


def object_of(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object of these pairs; one with a key that is given twice would lose a value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def written(value: Any, levels: int = bounds.depth) -> str:
    """JSON in one form, so that equal values are equal texts; numbers keep all their digits."""
    if value.__class__ is str:
        if "\x00" in value or repaired(value) != value:
            raise Bad("holds a NUL character, or what is not UTF-8")
        return encode_basestring(value)
    if value is None or value is True or value is False:
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float | Decimal):
        exact = value if isinstance(value, Decimal) else Decimal(repr(value))
        if not exact.is_finite() or abs(exact) > MAX_NUMBER:
            raise Bad("holds a number beyond 1.797e308")
        if exact.adjusted() < -400:
            raise Bad("holds a number with more than 400 digits")
        return str(_EXACT.normalize(exact)) if exact else "0"
    if isinstance(value, datetime):
        return encode_basestring(value.isoformat())
    if levels == 0:
        raise Bad(f"is nested deeper than {bounds.depth} levels")
    if isinstance(value, dict):
        pairs = sorted(((text(name) or "", inside) for name, inside in value.items()), key=itemgetter(0))
        if len({name for name, _ in pairs}) < len(pairs):
            raise Bad("has a key twice")
        return "{" + ",".join(f"{encode_basestring(k)}:{written(v, levels - 1)}" for k, v in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(written(item, levels - 1) for item in value) + "]"
    return written(str(value), levels)


def moment_of_file(path: Path) -> str:
    """When the file was written."""
    try:
        seconds = path.stat().st_mtime
    except OSError:
        seconds = 0
    return moment(datetime.fromtimestamp(int(seconds), timezone.utc)) or ""
