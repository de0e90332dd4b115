"""/api/v1/config: values that all instances share. Some keys are settings of Loom; the others belong to the clients."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import msgspec
from flask import Blueprint, Response, request
from msgspec import UNSET, UnsetType

from loom import config as configuration
from loom import db, errors
from loom.bounds import KIB, bounds
from loom.config import SECTIONS, SETTINGS, SHAREABLE, mask
from loom.http import answer, auth, entities, headers, idempotency, parse, yaml
from loom.http.permissions import ADMIN
from loom.http.settings import own
from loom.http.values import shown
from loom.state import config
from loom.state.config import Config
from loom.state.entities import change
from loom.state.writer import Writer

bp = Blueprint("config", __name__, url_prefix="/api/v1/config")

HIDDEN = [("database", name) for name in ("dsn", "dsn_file", "password_command", "folder")]  # hosts and paths
HIDDEN += [("server", "host"), ("logging", "output")]
PER_INSTANCE = "server.http_port"  # differs between instances, so a snapshot's value is never meant to be shared
# Keys of a snapshot, from Loom or from the original, that are not settings of Loom.
IGNORED = frozenset(
    {"security", "web_ui", "temporal", "projects", "providers", "agent_assignments", "model_catalog", "shared"}
)

Section = dict[str, Any] | UnsetType


class Snapshot(entities.Body):
    """Sections of settings."""

    database: Section = UNSET
    server: Section = UNSET
    agents: Section = UNSET
    beads: Section = UNSET
    locks: Section = UNSET
    events: Section = UNSET
    logging: Section = UNSET


class Value(msgspec.Struct):
    value: Any


KIND = entities.Kind(Config, entities.Body, required=(), filters=(), original=frozenset())
bp.add_url_rule("/<key>", "one", partial(entities.one, KIND))
bp.add_url_rule("/<key>", "delete", partial(entities.delete, KIND), methods=["DELETE"])
bp.add_url_rule("/<key>/history", "history", parse.query(*parse.PAGE)(partial(entities.history, KIND)))


@bp.put("/<key>")
def set_one(key: str) -> Response:
    value = _checked(parse.key(key), parse.body(Value, known=Config.__struct_fields__).value)
    if key in SHAREABLE:
        auth.require(ADMIN)
    writer, conditions = headers.writer(f"config:{key}"), headers.conditions()
    with db.connection() as conn:
        done = change(
            conn,
            writer,
            Config,
            key,
            "upsert",
            {"value": msgspec.Raw(msgspec.json.encode(value))},
            conditions=conditions,
        )
    return entities.versioned(done)


@bp.get("")
def snapshot() -> Response:
    """The settings in force in this instance, with passwords masked, and all shared values."""
    with db.connection() as conn:
        return _snapshot(conn)


@bp.put("")
def change_settings() -> Response:
    """Shares the settings of a snapshot that differ from those in force."""
    headers.no_conditions()
    given, writer = entities.written(parse.body(Snapshot)), headers.writer(None)
    with db.transaction() as conn:
        return _share(conn, writer, given, {})


@bp.post("/import.yaml")
def import_yaml() -> Response:
    """Shares the values of a YAML document: keys, or sections of settings."""
    headers.no_conditions()
    request.max_content_length = bounds.import_yaml
    given = yaml.read(parse.raw())
    sections = {key: given.pop(key) for key in Snapshot.__struct_fields__ if isinstance(given.get(key), dict)}
    values = {key: _checked(key, value) for key, value in given.items() if key not in IGNORED}
    writer = headers.writer(None)
    return idempotency.once(lambda conn: _share(conn, writer, sections, values), in_transaction=True)


@bp.get("/export.yaml")
def export_yaml() -> Response:
    with db.connection() as conn:
        values = config.values(conn)
    text = yaml.write({key: json.loads(value) for key, value in values.items()})
    return Response(text, content_type="application/x-yaml")


def _snapshot(conn: db.Connection) -> Response:
    values = config.values(conn)
    shared = {key: msgspec.Raw(value.encode()) for key, value in values.items()}
    sections = _shown(config.in_force(own(), values))
    if auth.caller().rank < ADMIN:
        for section, name in HIDDEN:
            sections[section][name] = "***"
        sections["server"]["allowed_hosts"] = []
        sections["logging"]["syslog"]["address"] = "***:0"
    return answer.json({**sections, "shared": shared})


def _share(conn: db.Connection, writer: Writer, sections: Mapping[str, Any], values: Mapping[str, Any]) -> Response:
    here = dict(_settings(_shown(config.in_force(own(), config.values(conn)))))
    changed = {
        key: _checked(key, value) for key, value in _settings(sections) if key != PER_INSTANCE and value != here[key]
    }
    config.share(conn, writer, {**changed, **values})
    return _snapshot(conn)


def _shown(settings: configuration.Config) -> dict[str, Any]:
    """The sections of a configuration, with passwords masked; without `security`, which only the operator sees."""
    sections = asdict(settings)
    del sections["sources"], sections["security"]
    sections["server"]["allowed_hosts"] = list(settings.server.allowed_hosts)  # compared with lists of JSON
    sections["database"]["dsn"] = mask(sections["database"]["dsn"])
    return sections


def _settings(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting in the sections, with its dotted key. Keys that Loom does not know are ignored."""
    for name, value in sections.items():
        key = prefix + name
        if key in SETTINGS:
            yield key, value
        elif key in SECTIONS and isinstance(value, dict):
            yield from _settings(value, key + ".")
        elif key in SECTIONS:
            raise errors.Invalid.field(key, "must be an object")


def _checked(key: str, value: Any) -> Any:
    """The value, checked for that key. Raises Invalid, which names the key, if it cannot be shared."""
    try:
        msgspec.convert(key, parse.Key)
    except msgspec.ValidationError:
        raise errors.Invalid.field(
            shown(key), "must have 1 to 200 characters, without control characters and /"
        ) from None
    parse.one_form(key, shown(key))
    if key in SHAREABLE:
        try:
            return configuration.check(key, value)
        except ValueError as exc:
            raise errors.Invalid.field(key, str(exc), allowed=configuration.allowed(key) or None) from None
    if key in SETTINGS:
        raise errors.Invalid.field(key, "cannot be shared: each instance has its own", allowed=sorted(SHAREABLE))
    word = key.partition(".")[0]
    if word in SECTIONS:
        near = configuration.nearest(key)
        raise errors.Invalid.field(key, f"is not a setting, the nearest one is {near}", allowed=sorted(SHAREABLE))
    if word in IGNORED or key in ("export.yaml", "import.yaml"):
        raise errors.Invalid.field(key, "is reserved: choose another name")
    if len(msgspec.json.encode(value)) > bounds.shared_value:
        raise errors.Invalid.field(key, f"must have at most {bounds.shared_value // KIB} KiB")
    return value
