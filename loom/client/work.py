"""`client.work(agent, handler)`: claims beads, keeps the claims alive while handlers run, and reports how they end."""

from __future__ import annotations

import logging
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from loom.client import clock, errors
from loom.client.base import path_of
from loom.client.coordination import Coordination
from loom.client.task import Outcome, Task, outcome_of
from loom.client.values import Claim, Json, of_json

log = logging.getLogger("loom.client")

Handler = Callable[[Task], Json | None]
LONGEST_BEAT = 30.0  # seconds between two heartbeats: an agent is dead after 120 s without one
IDLE_SECONDS = 5  # how long news is awaited, until it asks again: the end of a delay makes no event
WRONG = (errors.Invalid, errors.NotFound, errors.Unauthorized, errors.Forbidden)
NEWS = {"bead.created", "bead.updated", "bead.status_change", "bead.completed", "bead.deleted"}
SIGNALS = (signal.SIGTERM, signal.SIGINT)
ENDINGS = {"completed", "failed", "released"}
WORD = {"complete": "complete_bead", "fail": "fail_bead", "release": "release_claim"}


class Worker:
    """One agent's worker: up to `concurrency` handlers at a time, each in a thread of its own.

    A handler gets a Task. It returns None or the context to add to the bead, which is then completed. It raises
    Fail (or anything else) if the attempt failed, and GiveBack if another agent shall do it. Only one process may work
    as an agent: a second one takes over the beads of the first, whose handlers are then cancelled.
    """

    def __init__(
        self,
        client: Coordination,
        agent: str,
        handler: Handler,
        *,
        concurrency: int = 1,
        lease_seconds: int = 60,
        project_id: str | None = None,
        types: Sequence[str] = (),
        tags: Sequence[str] = (),
        grace: float = 10.0,
    ) -> None:
        """`grace`: seconds that handlers get to end by themselves when the worker stops."""
        self._client, self._agent, self._handler = client, agent, handler
        self._concurrency, self._grace = concurrency, grace
        self._lease_seconds = lease_seconds
        self._filters: dict[str, Any] = {"project_id": project_id, "types": types, "tags": tags}
        self._stop = threading.Event()
        self._over = threading.Event()  # nothing is held any more
        self._tasks: dict[str, Task] = {}
        self._change = threading.Condition()
        self._beat_now = threading.Event()
        self._asks = False  # a claim may be on its way
        self._error: errors.Problem | None = None
        self.done = 0  # beads completed

    def stop(self) -> None:
        """End `run`: claim nothing more, wait for the handlers, give back what they do not finish. Any thread may call
        it; a second call ends the wait."""
        if self._stop.is_set():
            self._grace = 0.0
        self._stop.set()

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Work until `stop`, SIGTERM or SIGINT, or until nothing is ready and `until` is true.

        Raises Invalid, NotFound, Unauthorized or Forbidden if Loom refuses to give it work.
        """
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS} if main else {}
        threads = [
            threading.Thread(target=target, args=arguments, name=f"{self._agent} {name}", daemon=True)
            for target, arguments, name in (
                (self._claim_until_stopped, (until,), "claims"),
                (self._beat_until_over, (), "heartbeat"),
                (self._watch_until_over, (), "watch"),
            )
        ]
        try:
            for thread in threads:
                thread.start()
            while not self._stop.wait(0.5):  # short, so that signals are handled
                pass
            self._drain()
        finally:
            self._stop.set()
            self._over.set()
            self._beat_now.set()
            for number, handler in before.items():
                signal.signal(number, handler)
        for thread in threads[1:]:
            thread.join()
        if self._error is not None:
            raise self._error

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def _drain(self) -> None:
        started = time.monotonic()
        while (self._tasks or self._asks) and time.monotonic() < started + self._grace:  # a second stop() sets it to 0
            with self._change:
                self._change.wait(0.1)
        for task in list(self._tasks.values()):
            task.cancel()
        ends = time.monotonic() + max(5.0, self._client.transport.attempt_timeout)
        while (self._tasks or self._asks) and time.monotonic() < ends:
            with self._change:
                self._change.wait(0.1)

    # --- claims

    def _claim_until_stopped(self, until: Callable[[], bool] | None) -> None:
        pause, cursor = 0.0, None
        resume: list[Json] | None = None
        while not self._stop.wait(pause):
            pause = 0.0
            with self._change:
                self._change.wait_for(lambda: self._stop.is_set() or len(self._tasks) < self._concurrency, 0.5)
                if len(self._tasks) >= self._concurrency:
                    continue
            try:
                if resume is None:
                    resume = self._take_over()
                if cursor is None:  # before it asks for work: what becomes ready afterwards is news
                    cursor = self._client.read_events(limit=1, stop=self._stop).next
                if resume:
                    self._reclaim(resume.pop())
                elif not self._claim_next():
                    if until is not None and not self._tasks and until():
                        self.stop()
                        return
                    cursor = self._news(cursor)
            except errors.CursorExpired:
                cursor = None
            except WRONG as exc:  # no such agent, for example: to ask again would not help
                self._error = exc
                self._stop.set()
            except errors.AgentBusy:
                pause = 2.0  # its beads are in the hands of another process, or of a person
            except (errors.Problem, errors.Unreachable) as exc:
                log.warning("agent %s cannot ask for work: %s", self._agent, exc)
                pause = random.uniform(1.0, 2.0)
            except Exception:
                log.exception("agent %s cannot ask for work", self._agent)
                pause = 5.0

    def _take_over(self) -> list[Json]:
        """Give back what this agent held before it restarted: a process that was thought dead loses its claims so."""
        held = self._client.rows(path_of("beads"), assigned_to=self._agent, status="in_progress")
        mine = [bead for bead in held if bead.get("fencing_token") is not None and bead["id"] not in self._tasks]
        for bead in mine:
            try:
                self._client.release_claim(bead["id"], bead["fencing_token"], reason="the worker restarts")
            except errors.Conflict as exc:
                log.info("bead %s is not taken over: %s", bead["id"], exc)
        return mine

    def _reclaim(self, bead: Json) -> None:
        try:
            self._claimed("POST", path_of("beads", bead["id"], "claim"), {}, resumed=True, once=False)
        except (errors.Conflict, errors.NotFound) as exc:
            log.info("bead %s is not resumed: %s", bead["id"], exc)

    def _claim_next(self) -> bool:
        wanted = {name: value for name, value in self._filters.items() if value}
        return self._claimed("POST", path_of("beads", "claim"), wanted, resumed=False, once=True)

    def _claimed(self, method: str, path: str, more: Json, *, resumed: bool, once: bool) -> bool:
        body = {"agent_id": self._agent, "lease_seconds": self._lease_seconds, **more}
        self._asks = True
        try:
            if self._stop.is_set():
                return False
            answer = self._client.send(method, path, body=body, once=once, stop=self._stop)
            if answer.status != 200:
                return False
            task = Task(of_json(Claim, answer.json), self._agent, answer.sent, resumed)
            with self._change:
                self._tasks[task.id] = task
        finally:
            self._asks = False
        if clock.now() - answer.sent > task.lease_seconds / 3:
            self._beat_now.set()
        threading.Thread(target=self._work, args=(task,), name=f"{self._agent} {task.id}", daemon=True).start()
        return True

    def _news(self, cursor: int) -> int:
        """Wait until a bead may have become ready, and return the next cursor."""
        ends = time.monotonic() + IDLE_SECONDS * random.uniform(0.8, 1.0)
        while not self._stop.is_set() and (left := ends - time.monotonic()) > 0:
            page = self._client.read_events(
                cursor,
                limit=1000,
                wait_seconds=math.ceil(left),
                project_id=self._filters["project_id"],
                stop=self._stop,
            )
            cursor = page.next
            if any(event.type in NEWS for event in page.events):
                break
        return cursor

    # --- one task

    def _work(self, task: Task) -> None:
        try:
            if self._stop.is_set():  # claimed by a request that was on its way
                task.cancel()
            outcome = outcome_of(task, self._handler)
            if outcome[0] == "fail":
                log.warning("bead %s failed: %s", task.id, outcome[1]["reason"])
            self._report(task, outcome)
            if outcome[0] == "release":  # else a handler that gives a bead back at once gets it again at once
                self._stop.wait(1.0)
        finally:
            with self._change:
                self._tasks.pop(task.id, None)
                self._change.notify_all()

    def _report(self, task: Task, outcome: Outcome) -> None:
        """Report it, for as long as the claim holds: heartbeats go on meanwhile."""
        task.reported = True
        while not task.lost:
            try:
                call = getattr(self._client, WORD[outcome[0]])
                call(task.id, task.fencing_token, timeout=max(1.0, task.lease.left), **outcome[1])
            except errors.ClaimLost as exc:
                task.lease.lose(f"it was {exc.ended_how}")
            except (errors.LockHeld, errors.Unavailable, errors.Unreachable) as exc:
                log.warning("bead %s cannot be reported as %s: %s", task.id, outcome[0], exc)
                self._over.wait(getattr(exc, "retry_after", None) or 1.0)
                if self._over.is_set():
                    return
            except errors.Problem as exc:
                if outcome[0] == "release":
                    log.warning("bead %s cannot be given back: %s", task.id, exc)
                    return
                outcome = ("fail", {"reason": f"{outcome[0]}: {exc}"[:10_000]})  # such as open children
            else:
                self.done += outcome[0] == "complete"
                return

    # --- what keeps the claims

    def _beat_until_over(self) -> None:
        pause = 0.0
        while not self._over.is_set():
            self._beat_now.wait(pause)
            self._beat_now.clear()
            if self._over.is_set():
                return
            held = dict(self._tasks)
            claims = {id: task.fencing_token for id, task in held.items() if not task.lost}
            bound = min([self._lease_seconds / 3, 10.0, *(max(0.5, held[id].lease.left) for id in claims)])
            try:
                status = "working" if claims else "idle"
                result, sent = self._client.heartbeat(self._agent, claims, status, timeout=bound)
            except Exception as exc:
                log.warning("no heartbeat of %s: %s", self._agent, exc)
                pause = min(1.0, self._lease_seconds / 10)
                continue
            for id in result.extended:
                held[id].lease.extend(sent, held[id].lease_seconds)
            for id, why in result.lost.items():
                if not (held[id].reported and why in ENDINGS):  # else its own report came first
                    held[id].lease.lose(f"it was {why or 'never made'}")
            pause = min(LONGEST_BEAT, self._lease_seconds / 3) * random.uniform(0.8, 1.0)

    def _watch_until_over(self) -> None:
        """A thread of its own: a heartbeat may hang for longer than its bound."""
        while not self._over.is_set():
            left = [task.lease.left for task in list(self._tasks.values()) if not task.lease.check()]
            self._over.wait(min([0.5, *left]))
