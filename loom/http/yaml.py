"""YAML for values that JSON can hold: no aliases, tags or dates. The cost of reading is bounded by the length."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from typing import Any

import yaml
from yaml.representer import SafeRepresenter

from loom import errors
from loom.bounds import bounds
from loom.http.values import object_of, shown

# A document takes ten times its length while it is read, and hardly any other thread runs: so one at a time is read.
_reading = threading.Lock()
READING_SECONDS = 2  # that a request waits for another one's
MAX_NUMBER = 400  # characters; the time to read a number such as 1:30:00 grows with their square
_TAG = "tag:yaml.org,2002:"
_BREAK = re.compile("[\r\n\x85\u2028\u2029]")
# PyYAML can be built without libyaml.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Emitter: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_SCALARS = [_TAG + kind for kind in ("str", "int", "float", "bool", "null")]
_NUMBERS = (_TAG + "int", _TAG + "float")
TAGGED = "has a tag, which JSON does not have"
NO_NUMBER = "is not a number in JSON"


class _Loader(_Parser):
    """Reads dates, `<<` and `=` as plain text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _SCALARS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read(raw: bytes) -> dict[str, Any]:
    """The keys and values of a document that is a mapping or empty.

    Raises Invalid, which names the key, and Busy when others are being read.
    """
    if not _reading.acquire(timeout=READING_SECONDS):
        raise errors.Busy("Other imports are being read.")
    try:
        return _read(raw)
    finally:
        _reading.release()


def _read(raw: bytes) -> dict[str, Any]:
    try:
        loader = _Loader(raw.decode("utf-8-sig"))
        loader.get_event()  # start of the stream
        if loader.check_event(yaml.StreamEndEvent):
            return {}
        loader.get_event()  # start of the document
        found = _Reader(loader).document()
        loader.get_event()
        if not loader.check_event(yaml.StreamEndEvent):
            raise errors.Invalid.field("body", "must be one document")
        return found
    except UnicodeDecodeError:
        raise errors.Invalid.field("body", "is not UTF-8") from None
    except yaml.MarkedYAMLError as exc:
        line = f" in line {exc.problem_mark.line + 1}" if exc.problem_mark else ""
        raise errors.Invalid.field("body", f"is not YAML{line}: {exc.problem}") from None
    except yaml.YAMLError:
        raise errors.Invalid.field("body", "is not YAML: it holds a character that YAML does not allow") from None


class _Representer(SafeRepresenter):
    """Writes text with line breaks on one line: on several lines, each would be indented by the depth of nesting."""

    def represent_text(self, value: str) -> yaml.ScalarNode:
        return self.represent_scalar(_TAG + "str", value, style='"' if _BREAK.search(value) else None)


_Representer.add_representer(str, _Representer.represent_text)


def write(values: Mapping[str, Any]) -> str:
    """A document with one line per key."""
    representer = _Representer(default_flow_style=True, sort_keys=False)
    node = representer.represent_mapping(_TAG + "map", values, flow_style=False)
    return yaml.serialize(node, Dumper=_Emitter, allow_unicode=True, width=2**31 - 1)


class _Reader:
    """Builds values from the parser's events; to compose nodes first would take a gigabyte for a document of 5 MiB."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._left = loader, bounds.values

    def document(self) -> dict[str, Any]:
        event = self._loader.get_event()
        if isinstance(event, yaml.ScalarEvent) and not event.value:
            return {}
        if not isinstance(event, yaml.MappingStartEvent):
            raise errors.Invalid.field("body", "must be a mapping of keys to values")
        return self._mapping("", 0)

    def _mapping(self, within: str, depth: int) -> dict[str, Any]:
        """The keys and values up to the end of the mapping. `within`: the path of keys to it, or ""."""
        pairs = []
        while not isinstance(event := self._loader.get_event(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _wrong(within, event, "has a key that is not text")
            path = f"{within}.{event.value}" if within else event.value
            pairs.append((event.value, self._value(path, depth)))
        return object_of(pairs, within)

    def _value(self, within: str, depth: int) -> Any:
        event = self._loader.get_event()
        self._left -= 1
        if self._left < 0:
            raise _wrong(within, event, f"is one value too many: a document may have up to {bounds.values}")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(within, event)
        if isinstance(event, yaml.AliasEvent):
            raise _wrong(within, event, "has an alias: write out its value")
        if event.tag not in (None, "!", _TAG + "map", _TAG + "seq"):
            raise _wrong(within, event, TAGGED)
        if depth == bounds.depth:
            raise _wrong(within, event, f"is nested deeper than {bounds.depth} levels")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(within, depth + 1)
        items: list[Any] = []
        while not self._loader.check_event(yaml.SequenceEndEvent):
            items.append(self._value(f"{within}[{len(items)}]", depth + 1))
        self._loader.get_event()
        return items

    def _scalar(self, within: str, event: yaml.ScalarEvent) -> Any:
        tag = event.tag
        if tag in (None, "!"):
            tag = self._loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag not in _SCALARS:
            raise _wrong(within, event, TAGGED)
        if tag in _NUMBERS and len(event.value) > MAX_NUMBER:
            raise _wrong(within, event, NO_NUMBER)
        try:
            value = _Loader.yaml_constructors[tag](self._loader, yaml.ScalarNode(tag, event.value))
        except (ValueError, LookupError, OverflowError):
            raise _wrong(within, event, f"is not a valid {tag.removeprefix(_TAG)}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(within, event, NO_NUMBER)
        return value


def _wrong(key: str, event: Any, problem: str) -> errors.Invalid:
    return errors.Invalid.field(shown(key or "body"), f"{problem} (line {event.start_mark.line + 1})")
