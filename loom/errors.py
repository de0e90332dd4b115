"""What can go wrong, one class a case: the docstring is the title that a client reads, the status stands beside it."""

from __future__ import annotations

from typing import Any


class Error(Exception):
    """Something went wrong on our side."""

    status = 500
    type = "internal"
    retry_after: int | None = None

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
    type = "invalid"

    @classmethod
    def field(cls, field: str, problem: str, **more: Any) -> Invalid:
        """The usual case: one field, what is wrong with it, and perhaps the values that are `allowed`."""
        return cls(f"{field}: {problem}", errors=[{"field": field, "problem": problem, **more}])


class NotFound(Error):
    """Not found."""

    status = 404
    type = "not-found"


class CursorExpired(Error):
    """The cursor is older than what is kept."""

    status = 410
    type = "cursor-expired"


class TooLarge(Error):
    """The request is too large."""

    status = 413
    type = "too-large"


class Stalled(Error):
    """The request did not come to its end."""

    status = 408
    type = "stalled"


class Conflict(Error):
    """The request conflicts with what is there."""

    status = 409
    type = "conflict"


class Taken(Conflict):
    """The id is taken."""

    type = "taken"


class InUse(Conflict):
    """It is still in use."""

    type = "in-use"


class Cycle(Conflict):
    """These would wait for each other for ever."""

    type = "cycle"


class Stale(Error):
    """It has changed since you read it."""

    status = 412
    type = "stale"


class LockHeld(Conflict):
    """The lock is held by another."""

    type = "lock-held"
    retry_after = 1


class LockLost(Conflict):
    """The lock is no longer yours."""

    type = "lock-lost"


class BeadClaimed(Conflict):
    """The bead is another's."""

    type = "bead-claimed"


class BeadBlocked(Conflict):
    """The bead is not ready."""

    type = "bead-blocked"


class BeadClosed(Conflict):
    """The bead is closed."""

    type = "bead-closed"


class AgentBusy(Conflict):
    """The agent has as many beads as it may have at once."""

    type = "agent-busy"


class ClaimLost(Conflict):
    """The claim is no longer yours."""

    type = "claim-lost"


class InProgress(Conflict):
    """A request with this Idempotency-Key is being answered now."""

    type = "in-progress"
    retry_after = 1


class KeyReused(Error):
    """This Idempotency-Key came with another request before."""

    status = 422
    type = "key-reused"


class Unavailable(Error):
    """The database cannot be reached now."""

    status = 503
    type = "unavailable"
    retry_after = 1


class Busy(Unavailable):
    """The database is too busy to answer in time."""

    type = "busy"


class Undone(Busy):
    """Others were at the same rows, each time; nothing was done."""


class SchemaError(Exception):
    """The database's schema and this Loom do not fit together; the text says what to do, in one line."""
