"""What JSON and YAML allow in values, and PostgreSQL or a reader of the answer does not."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from loom import errors

# The greatest number that fits into a double. 64 bits would not do: PostgreSQL returns 1e19 as an integer, and a value
# that was answered must be accepted again. answerable() in schema.sql has the same bound.
MAX_NUMBER = 17976931348623158 * 10**292
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')


def count(text: bytes, most: int) -> int:
    """At least the number of values in JSON, if there are more than `most`."""
    found = _marks(text)
    return found if found <= most else _marks(_STRING.sub(b"", text))


def _marks(text: bytes) -> int:
    """At least the number of values in JSON: each is the first of an object or array, or follows a comma."""
    return sum(map(text.count, (b",", b"[", b"{")))


def object_of(pairs: list[tuple[str, Any]], within: str = "") -> dict[str, Any]:
    """The object of these pairs. Raises Invalid for a NUL character, a number beyond a double, or a key given twice.

    JSON allows these, but PostgreSQL or a reader of the answer does not. within: the path to the object, if known.
    """
    found = dict(pairs)
    path = within and within + "."
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        raise errors.Invalid.field(path + shown(next(key for key in times if times[key] > 1)), "is given twice")
    for key, value in pairs:
        wrong = flaw(key) or flaw(value)
        if wrong:
            raise errors.Invalid.field(path + shown(key), wrong)
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
    if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        return "holds a number beyond 1.797e308"
    return None


def is_deeper(value: Any, levels: int) -> bool:
    """Whether a value is nested deeper than that. Merging is recursive, also in PostgreSQL, and must be bounded."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(each, levels - 1) for each in inside)


def integer_of(text: str) -> int:
    """Like int(), at a bounded cost: a number of 311 characters is already beyond MAX_NUMBER."""
    return int(text[:311])


class Pairs(list[tuple[str, Any]]):
    """An object of JSON, with its keys as they were given."""


def first_flaw(value: Any, path: str) -> errors.Invalid | None:
    """What object_of() refuses in a value, with the whole path to it."""
    if isinstance(value, Pairs):
        within = path + "." if path else ""
        times = Counter(key for key, _ in value)
        for key, inside in value:
            wrong = "is given twice" if times[key] > 1 else flaw(key)
            if wrong:
                return errors.Invalid.field(within + shown(key), wrong)
            if found := first_flaw(inside, within + shown(key)):
                return found
    elif isinstance(value, list):
        return next(filter(None, (first_flaw(each, f"{path}[{n}]") for n, each in enumerate(value))), None)
    elif wrong := flaw(value):
        return errors.Invalid.field(path or "body", wrong)
    return None
