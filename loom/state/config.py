"""Config: values that all instances share. Some are settings of Loom's own; the others mean nothing to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from loom import config, db
from loom.state.entities import Versioned
from loom.state.writer import Writer, call

log = logging.getLogger("loom.config")

# The shared settings, as a column of any SELECT, for Shared.learn(). As texts, and cut: by hand it may be anything.
COLUMN = "(SELECT jsonb_object_agg(key, left(value::text, 100)) FROM config WHERE key = ANY(%(settings)s)) AS shared"
PARAMETERS = {"settings": sorted(config.SHAREABLE)}


class Config(Versioned, kw_only=True):
    """A shared value, any JSON. `updated_by`: who wrote it last."""

    kind: ClassVar[str] = "config"
    table: ClassVar[str] = "config"
    key_column: ClassVar[str] = "key"

    key: str
    value: msgspec.Raw
    updated_by: str


def values(conn: db.Connection) -> dict[str, str]:
    """All there are, key -> JSON, in the order of their keys."""
    rows = db.rows(conn, "SELECT key, value::text AS value FROM config ORDER BY key")
    return {row["key"]: row["value"] for row in rows}


def share(conn: db.Connection, writer: Writer, given: Mapping[str, Any]) -> None:
    """Sets values, all or none, in one round trip. Raises LockHeld, LockLost, and Invalid when there is no room."""
    call(conn, writer, "SELECT share_values(%(given)s, %(fences)s)", given=json.dumps(given))


def in_force(own: config.Config, shared: Mapping[str, str]) -> config.Config:
    """What an instance goes by: its own configuration, with the settings (key -> JSON) that are shared and valid."""
    return config.with_values(own, _valid(shared)[0])


class Shared:
    """The shared settings as this instance knows them: by its last heartbeat. For several threads."""

    def __init__(self) -> None:
        self._read: Mapping[str, str] = {}
        self._valid: dict[str, Any] = {}
        self._made: tuple[config.Config, dict[str, Any], config.Config] | None = None

    def learn(self, read: Mapping[str, str] | None) -> bool:
        """Takes what COLUMN gave. Whether it is new."""
        read = read or {}
        if read == self._read:
            return False
        self._read = read
        self._valid, refused = _valid(read)
        log.info("settings-shared", extra={"fields": {"settings": self._valid}})
        for key, problem in refused.items():
            log.warning("setting-ignored", extra={"fields": {"setting": key, "reason": problem}})
        return True

    def over(self, own: config.Config) -> config.Config:
        """What is in force in an instance whose own configuration that is. Cheap: made anew only when one changes."""
        made, valid = self._made, self._valid
        if made is None or made[0] is not own or made[1] is not valid:
            made = self._made = own, valid, config.with_values(own, valid)
        return made[2]


def _valid(read: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings among shared values, and what is wrong with those that are refused."""
    found, refused = {}, {}
    for key in config.SHAREABLE & read.keys():
        try:
            found[key] = config.check(key, msgspec.json.decode(read[key]))
        except ValueError as exc:
            refused[key] = str(exc)
    return found, refused
