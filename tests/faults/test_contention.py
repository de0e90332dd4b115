"""Promises 1 and 2: one holder at a time, and a holder that loses its lock is told, whatever dies or pauses."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from harness import Answer, Client, Cluster, Patient
from harness.history import assert_one_holder, grants
from harness.load import Load, use_lock
from harness.locks import Sql
from harness.processes import stopped

CLIENTS = 200
LOCK = "/api/v1/locks/contended"


class Contender:
    """A client that acquires the lock again and again. It records its grants, by its own monotonic clock."""

    def __init__(self, ports: list[int], number: int, seed: int, turns: Iterator[int]) -> None:
        """`turns` counts the grants of all contenders, so that each fate gets its share however many there are."""
        self.turns = turns
        self.random = random.Random(f"{seed}/{number}")
        self.ports, self.client = ports, Patient([*ports[number % 3 :], *ports[: number % 3]])
        self.held: list[Holding] = []

    def run(self, over: threading.Event) -> None:
        while not over.is_set():
            ttl, owner = self.random.choice((1, 1, 1, 2)), str(uuid.UUID(int=self.random.getrandbits(128)))
            if self.random.random() < 0.04:
                self.hang_up(owner, ttl)
            elif (holding := self.acquire(owner, ttl, over)) is not None:
                self.held.append(holding)
                self.use(holding, {3: "die", 6: "renew", 9: "pause"}.get(next(self.turns) % 20, "release"))
        self.client.close()

    def hang_up(self, owner: str, ttl: int) -> None:
        """Wait for the lock, and disconnect before the answer."""
        client = Client(self.random.choice(self.ports), timeout=self.random.uniform(0.1, 0.5))
        with contextlib.suppress(OSError, http.client.HTTPException):
            client.post(LOCK, {"owner": owner, "ttl_seconds": ttl, "wait_seconds": 10})
        client.close()

    def acquire(self, owner: str, ttl: int, over: threading.Event) -> Holding | None:
        while not over.is_set():
            sent = time.monotonic()
            answer = self.client.post(LOCK, {"owner": owner, "ttl_seconds": ttl, "wait_seconds": 2})
            if answer.status in (200, 201):
                return Holding(answer.json, ttl, sent)
            assert (answer.status, answer.json["type"]) == (409, "/problems/lock-held"), answer
            over.wait(self.random.uniform(0.4, 1.0))
        return None

    def use(self, holding: Holding, fate: str) -> None:
        if fate == "die":
            return
        if fate == "pause":
            time.sleep(holding.ttl + 0.2)
        for _ in range(3 if fate == "renew" else 1 if fate == "pause" else 0):
            sent = time.monotonic()
            answer = self.client.put(LOCK, {"fencing_token": holding.token, "ttl_seconds": holding.ttl})
            holding.hear(answer, sent)
            assert fate != "pause" or answer.status == 409, f"a grant for {holding.ttl} s was renewed too late"
            time.sleep(self.random.uniform(0, 0.03))
        holding.stop()
        holding.hear(self.client.delete(f"{LOCK}?fencing_token={holding.token}"), time.monotonic())


class Holding:
    """A grant as its holder sees it: trusted from the answer on, for the TTL from when the request was sent."""

    def __init__(self, grant: dict[str, Any], ttl: int, sent: float) -> None:
        self.token, self.owner, self.ttl = grant["fencing_token"], grant["owner"], ttl
        self.since, self.until = time.monotonic(), sent + ttl
        self.promised_until = grant["expires_at"]
        self.released = False
        self.lost: dict[str, Any] | None = None

    def stop(self) -> None:
        """The holder no longer trusts its grant: the release is under way."""
        self.until = min(self.until, time.monotonic())

    def hear(self, answer: Answer, sent: float) -> None:
        if answer.status == 409:
            assert answer.json["type"] == "/problems/lock-lost"
            assert answer.json["ended_how"] == "expired", answer.json
            self.lost = answer.json
            self.stop()
        elif answer.status == 204:
            self.released = True
        else:
            assert answer.status == 200, answer
            assert self.lost is None, f"renewed after {self.lost}"
            self.until = sent + self.ttl
            self.promised_until = answer.json["expires_at"]


@contextlib.contextmanager
def faults(cluster: Cluster, back_ends: Callable[[], list[int]], chance: random.Random) -> Iterator[Counter[str]]:
    """While the block runs, kill workers, and stop workers and back ends of the database for longer than the TTL."""
    over, done = threading.Event(), Counter[str]()

    def strike() -> None:
        for n in itertools.count():
            kind, i = ("kill", "freeze", "freeze a back end")[n % 3], n // 3 % 3
            if over.wait(chance.uniform(0.4, 0.8)):
                return
            if kind == "kill":
                cluster.kill(i)
            elif kind == "freeze":
                with cluster.frozen(i):
                    time.sleep(chance.uniform(1.2, 2.2))
            else:
                victims = back_ends()
                with contextlib.suppress(ProcessLookupError), stopped(chance.sample(victims, min(1, len(victims)))):
                    time.sleep(1.2)
            done[kind] += 1

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def test_a_lock_never_has_two_holders_and_each_loser_is_told(
    start_cluster: Callable[..., Cluster], sql: Sql, seed: int, long: bool
) -> None:
    seconds = 60 if long else 12
    cluster = start_cluster(config="server: {threads: 96}")
    turns = itertools.count()
    contenders = [Contender(cluster.ports, number, seed, turns) for number in range(CLIENTS)]
    over, errors = threading.Event(), list[BaseException]()

    def run(contender: Contender) -> None:
        try:
            contender.run(over)
        except BaseException as exc:
            errors.append(exc)
            over.set()

    def back_ends() -> list[int]:
        rows = sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'loom:%'"
            " AND pid <> pg_backend_pid()"
        )
        return [pid for (pid,) in rows]

    threads = [threading.Thread(target=run, args=(contender,)) for contender in contenders]
    rush = Load(
        cluster.ports, [use_lock("rushed", ttl_seconds=1)] * 6
    )  # without a queue, so that requests race for the lock
    with rush, faults(cluster, back_ends, random.Random(seed)) as done:
        for thread in threads:
            thread.start()
        over.wait(seconds)
        over.set()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error

    time.sleep(2)  # the longest TTL: by now every lock that was not released has expired
    client = cluster.client(0)
    answer = client.post(LOCK, {"ttl_seconds": 1})
    assert answer.status == 201, answer
    last = answer.json
    assert client.delete(f"{LOCK}?fencing_token={last['fencing_token']}").status == 204

    past = grants(sql, "contended")
    assert_one_holder(past)
    assert past[-1].ended_how == "released", "a grant has no end"
    assert_one_holder(rushed := grants(sql, "rushed"))
    by_token = {grant.token: grant for grant in past}
    holdings = [h for c in contenders for h in c.held]
    # An answer that a frozen instance held back beyond the TTL was never trusted.
    trusted = sorted((h for h in holdings if h.since < h.until), key=lambda h: h.since)
    for former, later in itertools.pairwise(trusted):
        assert former.until <= later.since, f"{former.token} was trusted while {later.token} was held"
        assert former.token < later.token
    for holding in holdings:
        end = by_token[holding.token]
        assert end.owner == holding.owner
        assert end.ended_at is not None
        if holding.released:
            assert end.ended_how == "released"
        else:
            assert end.ended_how == "expired"
            assert end.ended_at >= datetime.fromisoformat(holding.promised_until), "ended before its promised end"
        told = client.put(LOCK, {"fencing_token": holding.token, "ttl_seconds": 1})
        assert (told.status, told.json["type"]) == (409, "/problems/lock-lost")
        assert told.json["ended_how"] == end.ended_how
        assert client.delete(f"{LOCK}?fencing_token={holding.token}").status == (204 if holding.released else 409)

    ends = Counter(grant.ended_how for grant in past)
    rates = f"{len(past) / seconds:.1f} grants/s, {len(rushed) / seconds:.1f} where nobody waits"
    print(f"{rates}; {dict(ends)}; {dict(done)}")
    assert ends["released"] > 10
    assert ends["expired"] > 1
    assert all(done[kind] >= 1 for kind in ("kill", "freeze", "freeze a back end")), done
