"""Errors, one class per case. The docstring is the title that a client reads; `status` is the HTTP status."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BY_TYPE: dict[str, type[Error]] = {}


class Error(Exception):
    """Something went wrong on our side."""

    status = 500
    type = "internal"
    retry_after: int | None = None

    def __init_subclass__(cls) -> None:
        """Derives `type` from the name of the class: LockHeld becomes lock-held."""
        cls.type = cls.__dict__.get("type") or re.sub("(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()
        BY_TYPE.setdefault(cls.type, cls)

    def __init__(self, detail: str | None = None, **members: Any) -> None:
        """`detail` says what happened this time; `members` are further members of the problem document."""
        super().__init__(detail or self.title)
        self.detail = detail
        self.members = members

    @property
    def title(self) -> str:
        return (type(self).__doc__ or "").splitlines()[0]


class Invalid(Error):
    """Invalid request."""

    status = 400

    @classmethod
    def field(cls, field: str, problem: str, *, allowed: Sequence[Any] | None = None, **more: Any) -> Invalid:
        """The usual case: one field, what is wrong with it, and the allowed values if they can be listed."""
        named = {} if allowed is None else {"allowed": list(allowed)}
        return cls(f"{field}: {problem}", errors=[{"field": field, "problem": problem, **named, **more}])


class Unauthorized(Error):
    """A valid API key is needed."""

    status = 401


class Forbidden(Error):
    """You may not do this."""

    status = 403


class Misdirected(Error):
    """This server does not answer for that host name."""

    status = 421


class NotFound(Error):
    """Not found."""

    status = 404


class CursorExpired(Error):
    """The cursor is older than the events that are kept."""

    status = 410


class TooLarge(Error):
    """The request is too large."""

    status = 413


class Compressed(Error):
    """The body is compressed."""

    status = 415


class Stalled(Error):
    """The request was not received completely."""

    status = 408


class Conflict(Error):
    """The request conflicts with the current state."""

    status = 409


class Taken(Conflict):
    """The id is already in use."""


class InUse(Conflict):
    """The entity is still in use."""


class ProjectClosed(Conflict):
    """The project is closed."""


class Cycle(Conflict):
    """The beads would wait for each other for ever."""


class TooManyBeads(Conflict):
    """Too many beads depend on each other."""


class Stale(Error):
    """A condition of the request is not met."""

    status = 412


class LockHeld(Conflict):
    """The lock is held by another owner."""

    retry_after = 1


class LockLost(Conflict):
    """The lock is no longer yours."""


class BeadClaimed(Conflict):
    """Somebody else has the bead."""


class BeadBlocked(Conflict):
    """The bead is not ready."""


class BeadClosed(Conflict):
    """The bead is closed."""


class OpenChildren(Conflict):
    """The bead has children that are not closed."""


class AgentBusy(Conflict):
    """The agent has the maximum number of beads in progress."""


class ClaimLost(Conflict):
    """The claim is no longer yours."""


class LastAdminKey(Conflict):
    """No key of an administrator would be left."""


class InProgress(Conflict):
    """A request with this Idempotency-Key is in progress."""

    retry_after = 1


class KeyReused(Error):
    """This Idempotency-Key was used for another request."""

    status = 422


class Unavailable(Error):
    """The database cannot be reached now."""

    status = 503
    retry_after = 1


class Busy(Unavailable):
    """The database is too busy to answer in time."""


class Exhausted(Busy):
    """The database has used up a resource, such as its disk or its table of locks."""

    type = Busy.type


class Undone(Busy):
    """The transaction was rolled back at each attempt; nothing was changed."""

    type = Busy.type


class Unfinished(Busy):
    """The request is done in part: send it again."""

    type = Busy.type


class SchemaError(Exception):
    """The database's schema does not fit this Loom; the text is one line that says what to do."""
