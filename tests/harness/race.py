"""Clients whose waits for locks end just as the locks become free, and strikes at their instances at that moment."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from harness.client import Answer, Client
from harness.cluster import Cluster
from harness.history import Past
from harness.lock_rules import Ask, History, Release, Strike, Wish, violations
from harness.locks import LOCKS, Sql
from harness.processes import wait_until

WAIT = 1  # seconds: the shortest wait
WAITS = (1, 1, 1, 3)  # for short-lived names; the longest goes on long after some clients have hung up
CROWD = 24  # clients of short-lived names
# What a waiting client does.
KINDS = ("leave", "ask again", "hang up", "hang up", "hang up and leave", "two", "twins", "retry")
CONTENDED, CONTENDERS = 3, 4  # names, and clients of each
# Seconds within which a contender that goes on asking is granted its lock. Each of the three others may let it
# expire (a TTL of 1 s) and then leave an abandoned place first in the queue (2 s): 9 s. A client that waits inside a
# frozen instance loses its place and starts again, perhaps several times.
PATIENCE = 45.0


def several(jobs: Sequence[Callable[[], object]], beside: Callable[[], object] = lambda: None) -> None:
    """Runs all jobs at once, and `beside` in this thread; raises what one of them raised."""
    faults: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as exc:
            faults.append(exc)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    run(beside)
    for thread in threads:
        thread.join()
    for fault in faults:
        raise fault


class Race:
    """One run of all clients against a cluster, and the answers that they got."""

    def __init__(self, cluster: Cluster, prefix: str, seed: str, strikes: Sequence[str]) -> None:
        """`prefix` of its locks' names; `strikes`: what is done to instances: drain, kill, freeze, restart."""
        self.wishes: list[Wish] = []
        self.strikes: list[Strike] = []
        self._cluster, self._prefix, self._seed, self._kinds = cluster, prefix, seed, strikes
        self._over, self._numbers = threading.Event(), itertools.count()
        self._wait_ends: list[tuple[float, int]] = []  # when, and in which instance

    def run(self, seconds: float) -> None:
        """Run for so many seconds, and until each client has finished its current turn."""
        jobs = [partial(self._repeat, self._short_lived, n) for n in range(CROWD)]
        jobs += [partial(self._repeat, self._contend, n) for n in range(CROWD, CROWD + CONTENDED * CONTENDERS)]
        timer = threading.Timer(seconds, self._over.set)
        timer.start()
        try:
            # In this thread: a gunicorn that is started anew dies with the thread that started it.
            several(jobs, beside=self._strike)
        finally:
            self._over.set()
            timer.cancel()

    def violations(self, sql: Sql) -> list[str]:
        """Compare the answers with the history in the database."""
        offset = time.time() - time.monotonic()
        columns = "lock_name, metadata ->> 'wish', fencing_token, owner, acquired_at, expires_at"
        rows = sql(
            f"""
            SELECT {columns}, ended_at, ended_how FROM grants WHERE lock_name LIKE %s
            UNION ALL
            SELECT {columns}, NULL, NULL FROM distributed_locks WHERE lock_name LIKE %s
             ORDER BY acquired_at, fencing_token
            """,
            *[f"{self._prefix}/%"] * 2,
        )
        by_name: dict[str, list[Past]] = defaultdict(list)
        for name, _, *grant in rows:
            by_name[name].append(Past(*grant))
        return violations(self.wishes, self.strikes, History(by_name, {row[2]: row[1] for row in rows}, offset))

    def figures(self) -> Counter[str]:
        """Count strikes, answers and grants."""
        asks = [ask for wish in self.wishes for ask in wish.asks]
        counts = Counter(strike.kind for strike in self.strikes)
        counts += Counter("hung up" if ask.hung_up else str(ask.status or "lost") for ask in asks)
        counts["grants told"] = sum(len(wish.told) for wish in self.wishes)
        counts["keys"] = sum(wish.key is not None for wish in self.wishes)
        return counts

    def _repeat(self, turn: Callable[[random.Random, int], None], number: int) -> None:
        chance = random.Random(f"{self._seed}/{number}")
        try:
            while not self._over.is_set():
                turn(chance, number)
        except BaseException:
            self._over.set()
            raise

    # What clients do -------------------------------------------------------------------------------------------------

    def _short_lived(self, chance: random.Random, number: int) -> None:
        """A lock becomes free, by release or expiry, at about the moment at which the waits for it end."""
        name, there, by_release = f"{self._prefix}/{next(self._numbers)}", chance.randrange(3), chance.random() < 0.6
        wait = chance.choice(WAITS)
        holder = self._wish(name, 30 if by_release else wait)
        held = None
        while held is None and not self._over.is_set():
            held = self._ask(holder, chance.randrange(3), wait=0).token
        if held is None:
            return
        ends = time.monotonic() + wait
        self._wait_ends.append((ends, there))
        waiters = []
        for _ in range(chance.choice((1, 1, 2, 3))):
            kind = chance.choice(KINDS)
            keyed = kind in ("twins", "retry")
            waiters.append((kind, self._wish(name, 30, own=not keyed or chance.random() < 0.5, key=keyed)))

        def free() -> None:
            early, late = chance.choice(((-0.002, 0.004), (-0.002, 0.004), (-0.03, 0.05)))
            time.sleep(wait / 2)  # by now they wait
            _, wish = chance.choice(waiters)
            moment = wish.asks[0].sent + wait + chance.uniform(early, late)
            time.sleep(max(0.0, moment - time.monotonic()))
            # Through the waiters' own instance, which polls for its waiters at once.
            self._release(holder, held, there)

        jobs = [partial(self._wait, random.Random(chance.random()), *waiter, wait, there, ends) for waiter in waiters]
        several([*jobs, free] if by_release else jobs)

    def _wait(self, chance: random.Random, kind: str, wish: Wish, wait: int, there: int, ends: float) -> None:
        """What a client does whose wait ends at about this moment."""
        hangs_up = kind in ("hang up", "hang up and leave", "retry")
        ask = partial(self._ask_and_use, chance, wish, wait=chance.choice((wait, 3)) if hangs_up else wait)
        if chance.random() < 0.3:
            there = chance.randrange(3)
        if kind in ("two", "twins"):
            other = (there + chance.choice((1, 1, 1, 0))) % 3
            several([partial(ask, there), partial(ask, other)])
            if kind == "twins" and chance.random() < 0.3:
                ask(chance.randrange(3))
            return
        if hangs_up:
            until = ends + chance.uniform(-0.03, 0.03)
            if chance.random() < (0.8 if wait > WAIT else 0.2):
                until = time.monotonic() + chance.uniform(0.05, wait / 2)
            ask(there, until=until)
            if kind == "hang up and leave":
                return
            there = chance.choice((there, chance.randrange(3)))
        else:
            ask(there)
        for _ in range(0 if kind == "leave" else 3):
            if not wish.told and not wish.asks[-1].lost:
                ask(there)
            there = chance.choice((there, chance.randrange(3)))

    def _contend(self, chance: random.Random, number: int) -> None:
        """A client that wants one of the contended locks until it gets it."""
        wish = self._wish(f"{self._prefix}/contended-{number % CONTENDED}", 1, key=chance.random() < 0.15)
        begun, there = time.monotonic(), chance.randrange(3)
        while not wish.told and not (wish.asks and wish.asks[-1].lost):
            if time.monotonic() > begun + PATIENCE:
                wish.gave_up = True
                return
            until = time.monotonic() + chance.uniform(0.02, 1.1) if chance.random() < 0.1 else None
            ask = self._ask_and_use(chance, wish, there, until=until, die=0.1)
            if ask.hung_up and chance.random() < 0.2:
                return
            there = chance.choice((there, chance.randrange(3)))

    def _ask_and_use(
        self,
        chance: random.Random,
        wish: Wish,
        there: int,
        *,
        wait: int = WAIT,
        until: float | None = None,
        die: float = 0.3,
    ) -> Ask:
        """Send one request. If it is the first with this grant, read the lock and, except by chance `die`, release."""
        ask = self._ask(wish, there, wait=wait, until=until)
        with wish.lock:
            first = ask.token is not None and len(wish.told[ask.token]) == 1
        if ask.token is None or not first:
            return ask
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.03), chance.uniform(0, 0.25 if wish.ttl > 1 else 0.03))))
        if chance.random() < 0.7:
            self._read(wish, ask, chance.randrange(3))
        if chance.random() >= die:
            self._release(wish, ask.token, chance.randrange(3))
            if wish.key is not None and chance.random() < 0.5:
                self._ask(wish, chance.randrange(3), wait=wait)
        return ask

    # One request each ------------------------------------------------------------------------------------------------

    def _wish(self, name: str, ttl: int, *, own: bool = True, key: bool = False) -> Wish:
        """`own`: the client names its owner; otherwise Loom generates one."""
        number = f"{self._prefix}/wish-{next(self._numbers)}"
        wish = Wish(number, name, ttl, f"owner of {number}" if own else None, f"key-of-{number}" if key else None)
        self.wishes.append(wish)
        return wish

    def _ask(self, wish: Wish, there: int, *, wait: int = WAIT, until: float | None = None) -> Ask:
        """Request the lock, and hang up at `until`."""
        ask = Ask(there, time.monotonic())
        with wish.lock:
            wish.asks.append(ask)
        body = {"ttl_seconds": wish.ttl, "wait_seconds": wait, "metadata": {"wish": wish.number}}
        body |= {} if wish.owner is None else {"owner": wish.owner}
        headers = {} if wish.key is None else {"Idempotency-Key": wish.key}
        seconds = 40.0 if until is None else max(0.001, until - ask.sent)
        try:
            answer = self._send(there, seconds, "POST", LOCKS + wish.name, body, headers)
        except TimeoutError:
            assert until is not None, f"no answer within {seconds} s"
            ask.hung_up, ask.ended = True, time.monotonic()
        except (OSError, http.client.HTTPException):
            ask.ended = time.monotonic()
            time.sleep(0.02)  # an immediate retry would only take CPU time from the instance that restarts
        else:
            with wish.lock:
                ask.said, ask.status, ask.ended = answer.json, answer.status, time.monotonic()
            assert answer.status in (200, 201, 409, 503), answer
        return ask

    def _release(self, wish: Wish, token: int, there: int) -> None:
        """Release, and retry until it is answered."""
        with wish.lock:
            release = wish.releases[token] = Release(time.monotonic())
        answer = self._insist("DELETE", f"{LOCKS}{wish.name}?fencing_token={token}", there)
        release.said = {} if answer.status == 204 else answer.json
        release.status, release.ended = answer.status, time.monotonic()
        assert answer.status in (204, 409), answer

    def _read(self, wish: Wish, ask: Ask, there: int) -> None:
        answer = self._insist("GET", LOCKS + wish.name, there)
        heard = time.monotonic()
        holds = answer.status == 200 and answer.json["fencing_token"] == ask.token
        with wish.lock:
            if not holds and heard < ask.sent + wish.ttl and ask.token not in wish.releases:
                wish.seen.append(
                    (heard, f"{ask.token} was granted, and then GET answered {answer.status} {answer.json}")
                )

    def _insist(self, method: str, path: str, there: int) -> Answer:
        give_up = time.monotonic() + PATIENCE
        for i in itertools.count(there):
            assert time.monotonic() < give_up, f"{method} {path} was not answered within {PATIENCE} s"
            with contextlib.suppress(OSError, http.client.HTTPException):
                answer = self._send(i % 3, 40.0, method, path)
                if answer.status != 503:
                    return answer
            time.sleep(0.01)
        raise AssertionError

    def _send(self, there: int, seconds: float, *request: Any) -> Answer:
        """Use a new connection: a server that shuts down may close a kept one just as it is used."""
        with contextlib.closing(Client(self._cluster.ports[there], seconds)) as client:
            return client.request(*request)

    # What is done to instances ---------------------------------------------------------------------------------------

    def _strike(self) -> None:
        chance = random.Random(f"{self._seed}/strikes")
        try:
            for kind in itertools.cycle(chance.sample(self._kinds, len(self._kinds))):
                if self._over.wait(chance.uniform(0.2, 0.7)):
                    return
                self._strike_once(kind, chance)
        except BaseException:
            self._over.set()
            raise

    def _strike_once(self, kind: str, chance: random.Random) -> None:
        soon = time.monotonic() + 0.05
        self._wait_ends = [wait for wait in self._wait_ends if wait[0] > soon]
        if self._wait_ends and chance.random() < 0.7:
            ends, there = min(self._wait_ends)
            time.sleep(max(0.0, ends + chance.uniform(-0.04, 0.02) - time.monotonic()))
        else:
            there = chance.randrange(3)
        strike = Strike(kind, there, time.monotonic())
        self.strikes.append(strike)
        self._do(kind, there, chance)
        strike.until = time.monotonic()

    def _do(self, kind: str, i: int, chance: random.Random) -> None:
        if kind == "restart":
            self._cluster.restart(i)
        elif kind == "freeze":
            with self._cluster.frozen(i):
                time.sleep(
                    chance.uniform(1.1, 2.3)
                )  # beyond the short TTL, and sometimes beyond the 2 s that a place lasts
        else:
            pid = self._cluster.pid(i)
            os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
            wait_until(lambda: self._cluster.pid(i) != pid, 30)
        self._cluster.wait_serving(i)
