"""Rules that the history of grants and claims must keep, whatever was done to their holders."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from harness.locks import Sql


@dataclass(frozen=True)
class Past:
    """A grant in the database; `ended_at` and `ended_how` are None for the one in distributed_locks."""

    token: int
    owner: str
    acquired_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    ended_how: str | None


def grants(sql: Sql, name: str) -> list[Past]:
    """Return every grant of a lock, in the order in which they began."""
    rows = sql(
        """
        SELECT fencing_token, owner, acquired_at, expires_at, ended_at, ended_how FROM grants WHERE lock_name = %s
        UNION ALL
        SELECT fencing_token, owner, acquired_at, expires_at, NULL, NULL FROM distributed_locks WHERE lock_name = %s
         ORDER BY acquired_at, fencing_token
        """,
        name,
        name,
    )
    return [Past(*row) for row in rows]


def assert_one_holder(past: list[Past]) -> None:
    """No two overlap by the database's clock, tokens grow, and only the last may have no end yet."""
    for former, later in itertools.pairwise(past):
        assert former.ended_at is not None, f"{former} has no end, yet {later} followed"
        assert former.ended_at <= later.acquired_at, f"{former} overlaps {later}"
        assert former.token < later.token, f"{later} has a smaller token than {former}"
    for grant in past:
        assert grant.acquired_at < grant.expires_at
        assert grant.ended_at is None or grant.acquired_at <= grant.ended_at <= grant.expires_at
        assert (grant.ended_how == "expired") == (grant.ended_at == grant.expires_at)


class PastClaim(NamedTuple):
    """A claim in the database that has ended."""

    token: int
    bead: str
    agent: str
    claimed_at: datetime
    expires_at: datetime
    ended_at: datetime
    ended_how: str


def claims(sql: Sql) -> dict[str, list[PastClaim]]:
    """Return every claim that has ended, by bead, in the order of the tokens."""
    rows = sql(
        "SELECT fencing_token, bead_id, agent_id, claimed_at, lease_expires_at, ended_at, ended_how"
        "  FROM claims ORDER BY bead_id, fencing_token"
    )
    return {bead: list(past) for bead, past in itertools.groupby(map(PastClaim._make, rows), lambda claim: claim.bead)}


def assert_one_claimant(past: list[PastClaim]) -> None:
    """No two claims of a bead overlap by the database's clock, and none lapsed too early."""
    for former, later in itertools.pairwise(past):
        assert former.ended_at <= later.claimed_at, f"{former} overlaps {later}"
    for claim in past:
        assert claim.claimed_at < claim.expires_at
        assert claim.claimed_at <= claim.ended_at
        assert claim.ended_how != "lapsed" or claim.expires_at <= claim.ended_at, claim
