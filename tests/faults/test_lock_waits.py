"""Promises 1 and 2 for waiters: each answer is true, also as a wait ends, a client disconnects or a client retries."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from harness import Cluster
from harness.locks import LOCKS, Sql, acquire, release
from harness.race import Race, several

STRIKES = ("drain", "kill", "freeze", "restart")
ROUND = 60.0  # seconds; after each, the answers are compared with the history


def test_every_answer_to_a_waiter_is_true_whatever_happens_as_its_lock_becomes_free(
    start_cluster: Callable[..., Cluster], sql: Sql, seed: int, long: bool
) -> None:
    cluster = start_cluster(config="server: {threads: 96}")
    figures = Counter[str]()
    for number in range(10 if long else 1):
        race = Race(cluster, f"race-{number}", f"{seed}/{number}", STRIKES)
        race.run(ROUND if long else 10)
        figures += race.figures()
        broken = race.violations(sql)
        print(f"round {number}, so far: {dict(figures)}")
        assert not broken, "\n".join([f"{len(broken)} violations, --seed={seed}", *broken[:20]])


def test_a_lock_granted_as_the_wait_for_it_ends_stays_held(
    start_cluster: Callable[..., Cluster], seed: int, long: bool
) -> None:
    """Without faults: the lock expires as the wait ends, so that the poll and the request may both acquire it."""
    cluster = start_cluster(config="server: {threads: 96}")
    told: list[bool] = []

    start = threading.Barrier(48)  # a poll for many waiters takes longer

    def wait_as_it_expires(number: int) -> None:
        chance, client = random.Random(f"{seed}/{number}"), cluster.client(0)
        for turn in range(60 if long else 5):
            name = f"expires-{number}-{turn}"
            start.wait(30)
            acquire(client, name, ttl_seconds=1)
            time.sleep(chance.uniform(0, 0.05))
            answer = client.post(LOCKS + name, {"wait_seconds": 1})
            if answer.status == 409:
                continue
            time.sleep(0.25)
            now, token = client.get(LOCKS + name), answer.json["fencing_token"]
            told.append(now.status == 200 and now.json["fencing_token"] == token)
            release(client, token, name)

    several([partial(wait_as_it_expires, number) for number in range(48)])
    print(f"of {len(told)} grants {told.count(False)} were lost")
    assert len(told) > 20
    assert all(told)
