"""Beads that depend on each other, and agents that complete them, fail, vanish or oversleep, and record each answer."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from harness.client import Answer, Methods, Patient
from harness.locks import assert_problem, instant
from harness.processes import wait_until
from harness.work import AGENTS, BEADS, PROJECT, beat, complete, fail, release

BATCH = 500  # beads of one bulk call
LEASE = 10  # seconds, the shortest lease
TRY = 2.0  # seconds after which an agent retries

# What happens to which of a hundred claims; the others are completed.
FATES = {
    **dict.fromkeys((5, 30, 55, 80), "fail"),
    **dict.fromkeys((15, 40, 65, 90), "release"),
    **dict.fromkeys((20, 70), "vanish"),  # the agent forgets the claim
    **dict.fromkeys((1, 51), "die"),  # the same with a long lease, which ends for lack of heartbeats
    45: "oversleep",  # completed after the end of the lease
    95: "stay",  # completed later than the first lease, which heartbeats extend
}
RARE = {"die": 25, "oversleep": 2, "stay": 2}  # only one in so many of them


@dataclass
class Plan:
    """A bead to be created. Others are named by their number; `blocked_by` has only smaller ones."""

    number: int
    priority: int
    due_date: str | None
    blocked_by: list[int]
    parent: int | None
    waits_for: set[int] = field(default_factory=set)  # its blockers and children


def plan_beads(count: int, chance: random.Random) -> list[Plan]:
    """Plan beads with dependencies.

    Each fifty have a chain, a bead that blocks many, a bead that many block, and a family of three generations; the
    rest are blocked by up to three others.
    """
    plans: list[Plan] = []
    for n in range(count):
        first, place = n - n % 50, n % 50
        parent = None
        if 1 <= place <= 9:
            blocked_by = [n - 1]
        elif 11 <= place <= 20:
            blocked_by = [first + 10]
        elif place == 21:
            blocked_by = [*range(first + 11, first + 21)]
        elif 22 <= place <= 27:
            blocked_by, parent = [], first + (28 if place < 25 else 29)
        else:
            blocked_by = sorted(chance.sample(range(n), min(n, chance.choice((0, 0, 1, 2, 3)))))
            parent = first + 30 if place in (28, 29) else None
        due = f"2030-{chance.randint(1, 12):02}-01T00:00:00Z" if chance.random() < 0.3 else None
        plans.append(Plan(n, chance.randrange(4), due, blocked_by, parent))
    for plan in plans:
        plan.waits_for.update(plan.blocked_by)
        if plan.parent is not None:
            plans[plan.parent].waits_for.add(plan.number)
    return plans


def make_beads(client: Methods, plans: Sequence[Plan]) -> list[str]:
    """Create the beads in bulk, send each call twice, and return the ids. Beads of one call are named by `ref`."""
    ids: list[str] = []
    for first in range(0, len(plans), BATCH):
        beads = [
            {
                "ref": f"n{plan.number}",
                "title": f"t{plan.number}",
                "project_id": PROJECT,
                "priority": plan.priority,
                "due_date": plan.due_date,
                "blocked_by": [ids[other] if other < first else f"n{other}" for other in plan.blocked_by],
                "parent": None if plan.parent is None else f"n{plan.parent}",
            }
            for plan in plans[first : first + BATCH]
        ]
        call = f"{BEADS}/bulk", {"beads": beads}
        answer, again = (client.post(*call, headers={"Idempotency-Key": f"bulk-{first}"}) for _ in range(2))
        assert (answer.status, answer.body) == (201, again.body), answer
        ids += [made["id"] for made in answer.json]
    return ids


@dataclass
class Holding:
    """A claim as its agent knows it."""

    token: int
    bead: str
    agent: str
    fate: str
    promised: datetime | None = None  # the end of the lease by the last answer
    ended_how: str | None = None  # by the last answer; None when it did not ask
    taken_over: bool = False  # after another claim had lapsed


class Agent:
    """An agent that claims beads one after the other, and retries each request until it is answered."""

    def __init__(self, server: str, name: str, seed: int, work: float, turns: Iterator[int], last_turn: int) -> None:
        """`work`: seconds for a bead, at most; `turns` counts all agents' claims; from `last_turn` on, all complete."""
        self.name, self.held = name, list[Holding]()
        self.client = Patient([server], TRY)
        self._random, self._over = random.Random(f"{seed}/{name}"), threading.Event()
        self._work, self._turns, self._last_turn, self._keys = work, turns, last_turn, itertools.count()

    def run(self) -> None:
        while not self._over.is_set():
            fate = self._fate(next(self._turns))
            if fate == "die":
                beat(self.client, self.name)
            held = self._claim(fate)
            if held is not None and held.ended_how is None:
                self._use(held)
        self.client.close()

    def stop(self) -> None:
        """End the agent after its current request."""
        self._over.set()

    def _fate(self, turn: int) -> str:
        fate = FATES.get(turn % 100, "complete") if turn < self._last_turn else "complete"
        return fate if turn // 100 % RARE.get(fate, 1) == 0 else "complete"

    def _claim(self, fate: str) -> Holding | None:
        """Claim the next bead, with one key until there is one, since a try without an answer may have succeeded."""
        body = {"agent_id": self.name, "lease_seconds": 30 * LEASE if fate == "die" else LEASE}
        key = {"Idempotency-Key": f"{self.name}-{next(self._keys)}"}
        while not self._over.is_set():
            answer = self.client.post(f"{BEADS}/claim", body, headers=key)
            if answer.status == 204:
                self._sleep(0.3, 0.6)
                continue
            if answer.status == 200:
                bead = answer.json["bead"]
                held = Holding(answer.json["fencing_token"], bead["id"], self.name, fate)
                held.promised = instant(answer.json["lease_expires_at"])
                held.taken_over = bead["attempts"] > bead["failures"]
            else:  # claimed by a try without an answer, and lost since
                lost = assert_problem(answer, 409, "claim-lost")
                held = Holding(lost["fencing_token"], lost["bead_id"], self.name, fate, ended_how=lost["ended_how"])
            self.held.append(held)
            return held
        return None

    def _use(self, held: Holding) -> None:
        self._sleep(
            *((1, 2) if held.taken_over else (0, self._work))
        )  # time for the former agent to try to complete it
        if held.fate == "vanish":
            self.client.close()
            self._sleep(0.5, 3)
        elif held.fate == "die":
            wait_until(lambda: self.client.get(f"{AGENTS}/{self.name}").json["status"] == "dead", 90, 0.5)
        elif held.fate == "fail":
            self._hear(held, "failed", 200, fail(self.client, held.bead, held.token, retry_after_seconds=0))
        elif held.fate == "release":
            self._hear(held, "released", 204, release(self.client, held.bead, held.token))
        else:
            overslept = held.fate == "oversleep" and not self._over.wait(LEASE + self._random.random())
            if held.fate == "stay":
                self._stay(held)
            elif self._random.random() < 0.1:
                self._beat(held)
            if held.ended_how is None:
                self._complete(held)
            assert not overslept or held.ended_how in ("lapsed", "agent-died"), held

    def _complete(self, held: Holding) -> None:
        words: dict[str, Any] = {"close_reason": f"by {self.name}", "context": {"token": str(held.token)}}
        self._hear(held, "completed", 200, complete(self.client, held.bead, held.token, **words))
        if self._random.random() < 0.05:
            self._hear(held, "completed", 200, complete(self.client, held.bead, held.token, **words))
            again = fail(self.client, held.bead, held.token)
            assert_problem(again, 409, "claim-lost", ended_how=held.ended_how)

    def _stay(self, held: Holding) -> None:
        """Work for longer than the lease, and extend it by heartbeats."""
        for _ in range(4):
            if held.ended_how is None and not self._over.wait(LEASE / 3):
                self._beat(held)

    def _beat(self, held: Holding) -> None:
        told = beat(self.client, self.name, claims={held.bead: held.token})
        if held.bead in told["extended"]:
            held.promised = instant(told["extended"][held.bead])
        else:
            held.ended_how = told["lost"][held.bead]

    def _hear(self, held: Holding, how: str, status: int, answer: Answer) -> None:
        if answer.status != status:
            how = assert_problem(answer, 409, "claim-lost")["ended_how"]
        assert held.ended_how in (None, how), (held, answer)
        held.ended_how = how

    def _sleep(self, least: float, most: float) -> None:
        self._over.wait(self._random.uniform(least, most))
