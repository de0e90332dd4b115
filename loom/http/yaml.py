"""YAML as JSON would say it: no aliases, tags or dates; what it costs to read is bounded by its length."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.representer import SafeRepresenter

from loom import errors
from loom.http.parse import MAX_DEPTH, flaw

MAX_VALUES = 500_000  # a second of reading; a megabyte of JSON, which is all that config may hold, has less
MAX_NUMBER = 400  # characters; what 1:30:00 stands for takes time with their square
_TAG = "tag:yaml.org,2002:"
_BREAK = re.compile("[\r\n\x85\u2028\u2029]")
# PyYAML can be built without libyaml.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Emitter: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_SCALARS: dict[str, Callable[[Any, yaml.ScalarNode], Any]] = {
    _TAG + "str": SafeConstructor.construct_yaml_str,
    _TAG + "int": SafeConstructor.construct_yaml_int,
    _TAG + "float": SafeConstructor.construct_yaml_float,
    _TAG + "bool": SafeConstructor.construct_yaml_bool,
    _TAG + "null": SafeConstructor.construct_yaml_null,
}
_NUMBERS = (_TAG + "int", _TAG + "float")
TAGGED = "has a tag that JSON has not"
NO_NUMBER = "is no number that JSON has"


class _Loader(_Parser):
    """Takes dates, `<<` and `=` for the text that they are."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _SCALARS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Fault(Exception):
    """What is wrong, and in which line."""

    def __init__(self, event: Any, text: str, key: str | None = None) -> None:
        super().__init__(f"{text} (line {event.start_mark.line + 1})")
        self.key = key


def read(raw: bytes) -> dict[str, Any]:
    """The keys and values of a document, which is a mapping, or empty. Raises Invalid, which names the key."""
    try:
        loader = _Loader(raw.decode("utf-8-sig"))
        for _ in range(2):  # where the stream and the document begin
            event = loader.get_event()
        if isinstance(event, yaml.StreamEndEvent):
            return {}
        found = _Reader(loader).document()
        loader.get_event()
        if not isinstance(loader.get_event(), yaml.StreamEndEvent):
            raise errors.Invalid.field("body", "must be one document")
        return found
    except UnicodeDecodeError:
        raise errors.Invalid.field("body", "is not UTF-8") from None
    except yaml.MarkedYAMLError as exc:
        line = f" in line {exc.problem_mark.line + 1}" if exc.problem_mark else ""
        raise errors.Invalid.field("body", f"is not YAML{line}: {exc.problem}") from None
    except yaml.YAMLError:
        raise errors.Invalid.field("body", "is not YAML: it holds a character that YAML does not take") from None


class _Representer(SafeRepresenter):
    """Keeps text with line breaks in one line: a break within would be indented by the depth of all that is around."""

    def represent_text(self, value: str) -> yaml.ScalarNode:
        return self.represent_scalar(_TAG + "str", value, style='"' if _BREAK.search(value) else None)


_Representer.add_representer(str, _Representer.represent_text)


def write(values: Mapping[str, Any]) -> str:
    """A document with one line a key."""
    representer = _Representer(default_flow_style=True, sort_keys=False)
    node = representer.represent_mapping(_TAG + "map", values, flow_style=False)
    return yaml.serialize(node, Dumper=_Emitter, allow_unicode=True, width=2**31 - 1)


def shown(key: str) -> str:
    """A key within a message of one line."""
    return json.dumps(key, ensure_ascii=False)[1:-1][:200]


class _Reader:
    """Makes values of the parser's events: composing their nodes first takes a gigabyte for what fits into 5 MiB."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._left = loader, MAX_VALUES

    def document(self) -> dict[str, Any]:
        event = self._loader.get_event()
        if isinstance(event, yaml.ScalarEvent) and not event.value:
            return {}
        if not isinstance(event, yaml.MappingStartEvent):
            raise errors.Invalid.field("body", "must be keys with values")
        found: dict[str, Any] = {}
        key: str | None = None
        try:
            while (key := self._key(found)) is not None:
                found[key] = self._value(0)
                key = None
        except _Fault as exc:
            raise errors.Invalid.field(shown(exc.key or key or "body"), str(exc)) from None
        return found

    def _key(self, found: Mapping[str, Any]) -> str | None:
        """The next key of a mapping, None at its end."""
        event = self._loader.get_event()
        if isinstance(event, yaml.MappingEndEvent):
            return None
        if not isinstance(event, yaml.ScalarEvent):
            raise _Fault(event, "has a key that is no text")
        if event.value in found:
            raise _Fault(event, "stands there twice", event.value)
        wrong = flaw(event.value)
        if wrong:
            raise _Fault(event, wrong, event.value)
        return event.value

    def _value(self, depth: int) -> Any:
        event = self._loader.get_event()
        self._left -= 1
        if self._left < 0:
            raise _Fault(event, f"is too much: a document may have {MAX_VALUES} values")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.AliasEvent):
            raise _Fault(event, "has an alias: write out what it stands for")
        if event.tag not in (None, "!", _TAG + "map", _TAG + "seq"):
            raise _Fault(event, TAGGED)
        if depth == MAX_DEPTH:
            raise _Fault(event, f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(self._loader.peek_event(), yaml.SequenceEndEvent):
                items.append(self._value(depth + 1))
            self._loader.get_event()
            return items
        found: dict[str, Any] = {}
        while (key := self._key(found)) is not None:
            found[key] = self._value(depth + 1)
        return found

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        tag = event.tag
        if tag in (None, "!"):
            tag = self._loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag not in _SCALARS:
            raise _Fault(event, TAGGED)
        if tag in _NUMBERS and len(event.value) > MAX_NUMBER:
            raise _Fault(event, NO_NUMBER)
        try:
            value = _SCALARS[tag](self._loader, yaml.ScalarNode(tag, event.value))
        except (ValueError, LookupError, OverflowError):
            raise _Fault(event, f"is no {tag.removeprefix(_TAG)}") from None
        wrong = NO_NUMBER if isinstance(value, float) and not math.isfinite(value) else flaw(value)
        if wrong:
            raise _Fault(event, wrong)
        return value
