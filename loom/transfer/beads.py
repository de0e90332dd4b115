"""Reads beads: a folder of YAML files, one bead each, and the issues.jsonl of `bd`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from loom.transfer import bd, values
from loom.transfer.bead_form import FIELDS, FORM, LISTS, links_of
from loom.transfer.build import Builders
from loom.transfer.errors import SourceError
from loom.transfer.report import Report
from loom.transfer.stage import Link, Row
from loom.transfer.values import Bad

MAX_FILE = 16 * 2**20  # bytes of one bead: far beyond what an entity may have
_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + kind for kind in ("null", "bool", "int", "float")}
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# projectid, and project_id: both spellings occur.
SPELLINGS = {name.replace("_", ""): name for name in (*FIELDS, *LISTS, "entity_metadata")}
_METADATA = {"schemaversion": "schema_version", "migratedat": "migrated_at", "migratedfrom": "migrated_from"}


class _Strict(_Loader):
    """Reads dates and YAML 1.1's yes and no as text, as they were written by Go."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return found


_Strict.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN and first not in "yYnNoO"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read(source: Path, report: Report) -> Iterator[Row | Link]:
    """The beads of a folder, of the .beads folder above them, or of an issues.jsonl. Raises SourceError."""
    if not source.exists():
        raise SourceError(f"{source}: there is no such file or folder")
    if source.is_file():
        yield from bd.read(source, report, 0)
        return
    count = 0
    builders = Builders(FORM, report, values.moment_of_file(source))
    for file in _yaml_files(source):
        count += 1
        yield from _Yaml(file, str(file.relative_to(source)), report, builders).rows(count)
    for file in sorted(source.rglob("issues.jsonl")):
        yield from bd.read(file, report, count)


def _yaml_files(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(at, name) for name in sorted(names) if name.endswith((".yaml", ".yml")) and name[0] != "_")


class _Yaml:
    """One file. What is wrong with it as a whole leaves it out."""

    def __init__(self, file: Path, origin: str, report: Report, builders: Builders) -> None:
        self._file, self._origin, self._report, self._builders = file, origin, report, builders

    def rows(self, n: int) -> Iterator[Row | Link]:
        try:
            bead = self._load()
        except Bad as bad:
            self._report.of("beads").read += 1
            self._report.leave_out("beads", values.repaired(self._origin), bad.reason)
            return
        if bead is None:
            return
        record: dict[str, Any] = {}
        metadata: Mapping[str, Any] = {}
        for name, value in bead.items():
            spelling = SPELLINGS.get(str(name).lower().replace("_", ""), str(name))
            if spelling == "entity_metadata" and isinstance(value, dict):
                metadata = value
            elif spelling in record:
                self._report.note("beads", self._origin, str(name), "is given twice: the first one counts", value)
            else:
                record[spelling] = value
        links = {name: record.pop(name) for name in ("parent", *LISTS) if name in record}
        more = {_METADATA.get(str(name).replace("_", ""), str(name)): value for name, value in metadata.items()}
        own = more.pop("attributes", None)
        if isinstance(own, dict) and "attributes" not in record:
            record["attributes"] = own
        elif own:
            more["entity_attributes"] = own
        row = self._builders.build(n, values.repaired(self._origin), record, {k: v for k, v in more.items() if v})
        if row is not None:
            yield row
            yield from links_of(str(row.values[0]), row.origin, links, self._report)

    def _load(self) -> dict[Any, Any] | None:
        try:
            if self._file.stat().st_size > MAX_FILE:
                raise Bad(f"has more than {MAX_FILE} bytes")
            raw = self._file.read_bytes()
        except OSError as exc:
            raise Bad(f"cannot be read: {exc.strerror}") from None
        try:
            whole = raw.decode()
            if "&" in whole and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(whole, _Loader)):
                raise Bad("holds an alias: a small file could become a very large bead")
            found = yaml.load(whole, _Strict)
        except UnicodeDecodeError:
            raise Bad("is not UTF-8") from None
        except yaml.MarkedYAMLError as exc:
            line = f" in line {exc.problem_mark.line + 1}" if exc.problem_mark else ""
            raise Bad(f"is not YAML{line}: {exc.problem}") from None
        except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError):
            raise Bad("is not YAML") from None
        if found is None:
            raise Bad("is empty")
        if not isinstance(found, dict):
            raise Bad("is not a bead, but a list or a text")
        return found
