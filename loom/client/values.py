"""Answers as values. Projects, providers, agents, beads and settings are plain JSON objects, as in the contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Protocol, TypeVar

Json = dict[str, Any]
V = TypeVar("V")


class Fence(Protocol):
    """A grant or claim that fences a write: the write is done only while it holds."""

    @property
    def lock_name(self) -> str: ...

    @property
    def fencing_token(self) -> int: ...


def of_json(kind: type[V], answer: Mapping[str, Any]) -> V:
    """A value from an answer. Members that a newer server adds are left out."""
    found = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in answer:
            value = answer[field.name]
            timed = isinstance(value, str) and "datetime" in str(field.type)
            found[field.name] = datetime.fromisoformat(value.replace("Z", "+00:00")) if timed else value
    return kind(**found)


@dataclass(frozen=True)
class Grant:
    """One holding of a lock."""

    lock_name: str
    owner: str
    instance_id: str | None
    fencing_token: int
    acquired_at: datetime
    expires_at: datetime
    heartbeat_at: datetime
    metadata: Json


@dataclass(frozen=True)
class HeldLock(Grant):
    """A lock that is held, and how many wait for it."""

    waiting: int = 0


@dataclass(frozen=True)
class PastGrant(Grant):
    """A grant in the history; `ended_how` is None while it is held."""

    ended_at: datetime | None = None
    ended_how: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Claim:
    """A bead that an agent has claimed."""

    bead: Json
    fencing_token: int
    lease_expires_at: datetime

    @property
    def lock_name(self) -> str:
        """The name under which the claim fences writes."""
        return f"bead:{self.bead['id']}"


@dataclass(frozen=True)
class HeartbeatResult:
    """Which claims are extended, until when, and which are lost, and why."""

    extended: dict[str, datetime]
    lost: dict[str, str | None]


@dataclass(frozen=True)
class FileLock:
    """A file of a project that an agent has locked."""

    file_path: str
    project_id: str
    agent_id: str
    expires_at: datetime
    fencing_token: int
    lock_name: str
    bead_id: str | None = None


@dataclass(frozen=True)
class Event:
    """A change of shared state. `id` is its cursor; an event of a history that nobody has read yet has none."""

    type: str
    entity_type: str
    entity_id: str
    version: int
    timestamp: datetime
    changes: Json
    id: int | None = None
    project_id: str | None = None
    actor: str | None = None
    instance_id: str | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class EventPage:
    """Events, and the cursor for the next page."""

    events: list[Event]
    next: int
