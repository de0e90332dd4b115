"""The requests for locks and their answers, and the rules that they and the history of grants must keep."""

from __future__ import annotations

import itertools
import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from harness.history import Past, assert_one_holder
from harness.locks import instant

GRACE = 1.5  # seconds after a client hung up or was cut off in which its request may still be granted
CLOCKS = 0.1  # seconds: tolerance between this machine's clock and the database's

STORY = 2.5  # seconds before and after a violation that its message covers


@dataclass
class Ask:
    """One request for a lock. `status` is 0 without an answer: the client hung up, or the connection was lost."""

    instance: int
    sent: float  # this and `ended` by the client's monotonic clock
    ended: float = math.inf
    status: int = 0
    said: dict[str, Any] = field(default_factory=dict)
    hung_up: bool = False

    @property
    def token(self) -> int | None:
        """The token of the grant in the answer."""
        return self.said["fencing_token"] if self.status in (200, 201) else None

    @property
    def refused(self) -> bool:
        return self.status == 409 and self.said["type"] == "/problems/lock-held"

    @property
    def lost(self) -> bool:
        return self.status == 409 and self.said["type"] == "/problems/lock-lost"


@dataclass
class Release:
    """The release of a grant; `status` is 0 until it is answered."""

    sent: float
    ended: float = math.inf
    status: int = 0
    said: dict[str, Any] = field(default_factory=dict)


Broken = tuple[float, str]  # when, by the clients' clock, and how a rule was broken


@dataclass
class Wish:
    """One owner's wish for one lock. All its requests, and so its grants, carry its number in their metadata."""

    number: str
    name: str
    ttl: int
    owner: str | None
    key: str | None = None
    asks: list[Ask] = field(default_factory=list)
    releases: dict[int, Release] = field(default_factory=dict)
    seen: list[Broken] = field(default_factory=list)  # violations that its client saw
    gave_up: bool = False  # it retried and was not granted the lock within the bound
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def told(self) -> dict[int, list[Ask]]:
        """The answers with a grant, by its token."""
        by_token: dict[int, list[Ask]] = defaultdict(list)
        for ask in self.asks:
            if ask.token is not None:
                by_token[ask.token].append(ask)
        return by_token


@dataclass
class Strike:
    """What was done to an instance, from `since` until it served again."""

    kind: str
    instance: int
    since: float
    until: float = math.inf


@dataclass
class History:
    """The grants of one run, by lock and in the order in which they began."""

    by_name: Mapping[str, Sequence[Past]]
    wishes: Mapping[int, str]  # the number of its wish, by token
    offset: float  # the wall clock minus the monotonic one

    def at(self, time: datetime) -> float:
        """Convert to the clients' monotonic clock."""
        return time.timestamp() - self.offset


def violations(wishes: Iterable[Wish], strikes: Sequence[Strike], history: History) -> list[str]:
    """Return a message for each broken rule, with what happened to the lock at about that time."""
    found: list[str] = []
    by_name: dict[str, list[Wish]] = defaultdict(list)
    for wish in wishes:
        by_name[wish.name].append(wish)
    for name, asked in by_name.items():
        past = history.by_name.get(name, ())
        broken = [*_overlaps(asked), *_overlaps_in_history(past, history)]
        for wish in asked:
            own = {grant.token: grant for grant in past if history.wishes[grant.token] == wish.number}
            for rule in (_ended_early, _granted_to_nobody, _refused_while_it_held, _key_answers):
                broken += rule(wish, own, strikes, history)
            broken += wish.seen
            if wish.gave_up:
                waited = wish.asks[-1].ended - wish.asks[0].sent
                broken.append((wish.asks[-1].ended, f"{wish.number} asked for {waited:.1f} s and was not granted"))
        found += [f"{name}: {what}\n{_story(at, asked, past, history)}" for at, what in broken]
    return found


def _overlaps(asked: Sequence[Wish]) -> Iterator[Broken]:
    """Rule 1: no two grants are trusted at once, and later grants have larger tokens."""
    trusted: list[tuple[float, float, int]] = []
    for wish in asked:
        for token, answers in wish.told.items():
            stop = wish.releases[token].sent if token in wish.releases else math.inf
            trusted += [(a.ended, min(a.sent + wish.ttl, stop), token) for a in answers]
    trusted = sorted(t for t in trusted if t[0] < t[1])  # else answered after its end, as by a frozen instance
    for former, later in itertools.pairwise(trusted):
        if former[2] == later[2]:
            continue
        if former[1] > later[0]:
            both = former[1] - later[0]
            yield later[0], f"{former[2]} was trusted while {later[2]} was held, for {both:.3f} s"
        if former[2] > later[2]:
            yield later[0], f"{later[2]} was granted after {former[2]}"


def _overlaps_in_history(past: Sequence[Past], history: History) -> Iterator[Broken]:
    """Rule 1, by the database's clock."""
    try:
        assert_one_holder(list(past))
    except AssertionError as exc:
        yield history.at(past[0].acquired_at), str(exc).splitlines()[0]


Own = Mapping[int, Past]


def _ended_early(wish: Wish, own: Own, strikes: Sequence[Strike], history: History) -> Iterator[Broken]:
    """Rule 2: a grant that its client was told of, and did not release, ends only at its promised end."""
    for token, answers in wish.told.items():
        at, grant, release = answers[0].ended, own.get(token), wish.releases.get(token)
        if grant is None:
            yield at, f"{token} was answered and is not in the history"
            continue
        how = grant.ended_how
        if release is not None and release.status == 204 and how != "released":
            yield at, f"{token}: its release was answered 204, and it ended {how}"
        if release is not None and release.status == 409 and release.said["ended_how"] != how:
            yield at, f"{token} ended {how}, and its holder was told {release.said['ended_how']}"
        if how not in (None, "expired") and (
            release is None or history.at(grant.ended_at or grant.expires_at) < release.sent - CLOCKS
        ):
            yield at, f"{token} was {how}, {'not' if release is None else 'and only then'} by its holder"
        promised = max(instant(answer.said["expires_at"]) for answer in answers)
        if how == "expired" and grant.expires_at < promised:
            yield at, f"{token} ended at {grant.expires_at}, before its promised end {promised}"


def _granted_to_nobody(wish: Wish, own: Own, strikes: Sequence[Strike], history: History) -> Iterator[Broken]:
    """Rule 3: every grant is answered, unless its request was cut off at about that time."""
    for token in own.keys() - wish.told.keys():
        at = history.at(own[token].acquired_at)
        if not any(ask.sent - CLOCKS <= at <= _may_be_granted_until(ask, strikes) for ask in wish.asks):
            yield at, f"{token} was granted to a client that had left, or was refused"


def _may_be_granted_until(ask: Ask, strikes: Sequence[Strike]) -> float:
    """Return until when this request may be granted without an answer to its client."""
    there = sorted((s for s in strikes if s.instance == ask.instance), key=lambda strike: strike.since)
    cut = ask.hung_up or ask.status == 503
    if ask.status == 0 and not cut:  # a drain cuts off nobody
        cut = any(s.kind in ("kill", "freeze") and s.since - CLOCKS <= ask.ended <= s.until + CLOCKS for s in there)
    if not cut:
        return -math.inf
    until = ask.ended + GRACE
    for strike in there:  # a frozen instance goes on when it wakes; a new one accepts clients that connected meanwhile
        if strike.since <= until and strike.until >= ask.sent:
            until = max(until, strike.until + GRACE)
    return until


def _refused_while_it_held(wish: Wish, own: Own, strikes: Sequence[Strike], history: History) -> Iterator[Broken]:
    """Rule 3: an owner that acquires a lock that it holds is answered its grant."""
    for ask in wish.asks:
        for grant in own.values() if ask.refused else ():
            ended = math.inf if grant.ended_at is None else history.at(grant.ended_at)
            if history.at(grant.acquired_at) < ask.sent - CLOCKS and ask.ended + CLOCKS < min(
                ended, history.at(grant.expires_at)
            ):
                yield ask.ended, f"{grant.token} was held, and its owner was refused"


def _key_answers(wish: Wish, own: Own, strikes: Sequence[Strike], history: History) -> Iterator[Broken]:
    """Rule 4: a key has one grant, and once that has ended a retry is answered lock-lost."""
    if wish.key is None:
        return
    if len(wish.told) > 1:
        yield wish.asks[-1].ended, f"one key was answered the grants {sorted(wish.told)}"
    if len(own) > 1:
        yield wish.asks[-1].ended, f"one key has the grants {sorted(own)}"
    for token, release in wish.releases.items():
        for ask in wish.asks:
            late = ask.sent > release.ended and release.status == 204 and ask.status not in (0, 503)
            if late and not ask.lost:
                yield ask.ended, f"{token} was released, and a retry with its key was answered {ask.status} {ask.said}"


def _story(at: float, asked: Sequence[Wish], past: Sequence[Past], history: History) -> str:
    """Return what happened to a lock before and after, in order, as help to find the cause."""
    lines: list[Broken] = []
    for wish in asked:
        who = f"{wish.number}{' with a key' if wish.key else ''}"
        for ask in wish.asks:
            how = "hung up" if ask.hung_up else f"{ask.status} {ask.token or ask.said.get('type', '')}"
            lines += [(ask.sent, f"{who} asks {ask.instance}"), (ask.ended, f"{who} asked {ask.instance}: {how}")]
        for token, release in wish.releases.items():
            lines += [(release.sent, f"{who} releases {token}"), (release.ended, f"{who}: {release.status}")]
    for grant in past:
        lines.append((history.at(grant.acquired_at), f"{grant.token} granted to {history.wishes[grant.token]}"))
        if grant.ended_at is not None:
            lines.append((history.at(grant.ended_at), f"{grant.token} {grant.ended_how}"))
    near = sorted(line for line in lines if at - STORY < line[0] < at + STORY)
    return "\n".join(f"    {when - at:7.3f} {what}" for when, what in near)
