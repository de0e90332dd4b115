"""What can go wrong, one class a case: the docstring is the title that a client reads, the status stands beside it."""

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
        """A class's `type` is its own name in small letters: LockHeld is lock-held."""
        cls.type = cls.__dict__.get("type") or re.sub("(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()
        BY_TYPE.setdefault(cls.type, cls)

    def __init__(self, detail: str | None = None, **members: Any) -> None:
        """`detail` says what happened this time; `members` are what the case needs, as they stand in the answer."""
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
        """The usual case: one field, what is wrong with it, and the values that it may have where they are few."""
        named = {} if allowed is None else {"allowed": list(allowed)}
        return cls(f"{field}: {problem}", errors=[{"field": field, "problem": problem, **named, **more}])


class NotFound(Error):
    """Not found."""

    status = 404


class CursorExpired(Error):
    """The cursor is older than what is kept."""

    status = 410


class TooLarge(Error):
    """The request is too large."""

    status = 413


class Stalled(Error):
    """The request did not come to its end."""

    status = 408


class Conflict(Error):
    """The request conflicts with what is there."""

    status = 409


class Taken(Conflict):
    """The id is taken."""


class InUse(Conflict):
    """It is still in use."""


class ProjectClosed(Conflict):
    """The project is closed."""


class Cycle(Conflict):
    """These would wait for each other for ever."""


class Stale(Error):
    """A condition of the request is not met."""

    status = 412


class LockHeld(Conflict):
    """The lock is held by another."""

    retry_after = 1


class LockLost(Conflict):
    """The lock is no longer yours."""


class BeadClaimed(Conflict):
    """The bead is another's."""


class BeadBlocked(Conflict):
    """The bead is not ready."""


class BeadClosed(Conflict):
    """The bead is closed."""


class OpenChildren(Conflict):
    """The bead has children that are not closed."""


class AgentBusy(Conflict):
    """The agent has as many beads as it may have at once."""


class ClaimLost(Conflict):
    """The claim is no longer yours."""


class InProgress(Conflict):
    """A request with this Idempotency-Key is being answered now."""

    retry_after = 1


class KeyReused(Error):
    """This Idempotency-Key came with another request before."""

    status = 422


class Unavailable(Error):
    """The database cannot be reached now."""

    status = 503
    retry_after = 1


class Busy(Unavailable):
    """The database is too busy to answer in time."""


class Undone(Busy):
    """Others were at the same rows, each time; nothing was done."""

    type = Busy.type


class SchemaError(Exception):
    """The database's schema and this Loom do not fit together; the text says what to do, in one line."""
