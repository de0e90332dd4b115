"""What calls raise: one class for each type of problem that Loom answers, with the members of the problem."""

from __future__ import annotations

import re
from typing import Any

BY_TYPE: dict[str, type[Problem]] = {}


class Error(Exception):
    """A call failed."""


class Unreachable(Error):
    """No server answered in time. A write may have been done nevertheless."""


class Problem(Error):
    """Loom refused the request, or failed.

    `type` is its word, such as `lock-held`; the other members of the problem, such as `holder`, are attributes too.
    `retried`: an earlier attempt of this call got no answer, and may have been done. So after a write with a condition,
    Stale may be about the call's own write.
    """

    type = "internal"

    def __init_subclass__(cls) -> None:
        """Derives `type` from the name of the class: LockHeld becomes lock-held."""
        cls.type = re.sub("(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()
        BY_TYPE[cls.type] = cls

    def __init__(
        self,
        detail: str,
        *,
        status: int = 409,
        title: str = "",
        members: dict[str, Any] | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        retried: bool = False,
    ) -> None:
        super().__init__(detail)
        self.detail, self.status, self.title = detail, status, title or detail
        self.members = members or {}
        self.retry_after, self.request_id, self.retried = retry_after, request_id, retried

    def __getattr__(self, name: str) -> Any:
        members = self.__dict__.get("members", {})
        if name in members:
            return members[name]
        raise AttributeError(f"{type(self).__name__} has no member {name!r}; it has {sorted(members)}")


class Internal(Problem):
    """A fault of Loom's own; its log says more."""


class Invalid(Problem):
    """The request is wrong; `errors` names the fields."""


class Unauthorized(Problem):
    """The API key is missing or wrong."""


class Forbidden(Problem):
    """The API key does not allow this."""


class Misdirected(Problem):
    """This server does not answer for that host name."""


class NotFound(Problem):
    """There is no such thing."""


class CursorExpired(Problem):
    """The cursor is older than the events that are kept."""


class TooLarge(Problem):
    """The body, or the entity that it would make, is larger than its bound."""


class Compressed(Problem):
    """The body has a Content-Encoding."""


class Stalled(Problem):
    """The request was not received completely."""


class Conflict(Problem):
    """The request conflicts with the current state. Also the base of the errors below that are a 409."""


class Taken(Conflict):
    """The id is already in use."""


class LastAdminKey(Conflict):
    """No key of an administrator would be left."""


class InUse(Conflict):
    """The entity is still in use."""


class ProjectClosed(Conflict):
    """The project is closed."""


class Cycle(Conflict):
    """The beads would wait for each other for ever."""


class TooManyBeads(Conflict):
    """Too many beads depend on each other."""


class LockHeld(Conflict):
    """Another owner holds the lock: `holder`."""


class LockLost(Conflict):
    """The lock is no longer yours."""


class BeadClaimed(Conflict):
    """Somebody else has the bead: `holder`."""


class BeadBlocked(Conflict):
    """The bead is not ready: `blocked_by`, `children`, `not_before`."""


class BeadClosed(Conflict):
    """The bead is closed."""


class OpenChildren(Conflict):
    """The bead has `children` that are not closed; the claim goes on."""


class AgentBusy(Conflict):
    """The agent has the maximum number of `beads` in progress."""


class ClaimLost(Conflict):
    """The claim is no longer yours."""


class InProgress(Conflict):
    """A request with this Idempotency-Key is in progress."""


class Stale(Problem):
    """A condition is not met: `current`, `changed`, `changed_by`."""


class KeyReused(Problem):
    """This Idempotency-Key was used for another request."""


class Unavailable(Problem):
    """The database cannot be reached."""


class Busy(Unavailable):
    """The database is too busy to answer in time."""


def of_answer(
    status: int, problem: Any, *, retry_after: float | None, request_id: str | None, retried: bool
) -> Problem:
    """The error of an answer. `problem`: its body as JSON, or None if it is something else, such as a proxy's page."""
    members = dict(problem) if isinstance(problem, dict) else {}
    kind = BY_TYPE.get(str(members.pop("type", "")).rpartition("/")[2], Problem)
    title = str(members.pop("title", f"HTTP status {status}"))
    detail = str(members.pop("detail", None) or members.pop("error", None) or title)
    members.pop("status", None)
    return kind(
        detail,
        status=status,
        title=title,
        members=members,
        retry_after=retry_after,
        request_id=request_id,
        retried=retried,
    )
