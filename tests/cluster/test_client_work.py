"""Worker pools of `loom.client` under faults: each bead is completed once, none is lost, and the cancelled stop."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from harness import MARGIN, Cluster, Patient, Postgres, Process, wait_until
from harness.agents import make_beads, plan_beads
from harness.loom_client import client_of, team_of
from harness.postgres import query
from harness.processes import stopped
from harness.work import assert_counted

import loom.client
from loom.client import Cancelled, GiveBack, Task, errors

PROGRAM = Path(__file__).parents[1] / "harness/client_worker.py"
LEASE = 10  # seconds, of the program


class Workers:
    """Processes of the program, and what they wrote into their log."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.log = folder / "workers.jsonl"
        self.log.touch()
        self._servers = ",".join(f"http://127.0.0.1:{port}" for port in cluster.ports)
        self._folder = folder

    def start(self, agent: str, concurrency: int = 4, seconds: float = 0.05) -> Process:
        command = [sys.executable, PROGRAM, self._servers, agent, str(concurrency), str(seconds), self.log]
        return Process(command, self._folder / f"{agent}.log")

    def lines(self, what: str | None = None) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in found if what in (None, line["what"])]


@pytest.mark.timeout(0)
def test_a_pool_drains_beads_with_dependencies_while_everything_fails(
    start_cluster: Callable[..., Cluster], own_postgres: Postgres, tmp_path: Path, seed: int, long: bool
) -> None:
    """Instances and workers are killed, workers are frozen beyond their lease, and the database restarts."""
    count, chance = (5000 if long else 300), random.Random(seed)
    dsn = own_postgres.dsn(own_postgres.database())
    cluster = start_cluster(3, dsn=dsn)
    client, workers = client_of(cluster), Workers(cluster, tmp_path)
    agents = [f"w{n}" for n in range(4)]
    team_of(client, *agents)
    patient = Patient([f"http://127.0.0.1:{port}" for port in cluster.ports])
    ids = make_beads(patient, plan_beads(count, chance))
    patient.close()
    processes = {agent: workers.start(agent, seconds=0.4) for agent in agents}

    def left() -> int | None:
        with contextlib.suppress(psycopg2.OperationalError):
            return query(dsn, "SELECT count(*) FROM beads WHERE status <> 'closed'")[0][0]
        return None

    for agent in agents:
        wait_until(lambda agent=agent: [1 for line in workers.lines("begin") if line["agent"] == agent], 60)
    rounds, killed = 0, set[int]()
    while rounds == 0 or (long and left() != 0):  # in this thread: what a thread starts ends with it
        with stopped([processes[agents[0]].pid]):  # its beads lapse, and others complete them
            for _ in range(3):
                cluster.kill(chance.randrange(3))
                victim = chance.choice(agents[1:])
                killed.add(processes[victim].pid)
                processes[victim].stop(signal.SIGKILL)
                processes[victim] = workers.start(victim, seconds=0.4)
                time.sleep(1.0)
            own_postgres.kill()
            time.sleep(1.0)
            own_postgres.start()
            time.sleep(LEASE)
        rounds += 1
        time.sleep(5 if long else 0)
    wait_until(lambda: left() == 0, 240, 0.2)
    for process in processes.values():
        process.stop(signal.SIGTERM, 20)
    completed = Counter(key for (key,) in query(dsn, "SELECT entity_id FROM events WHERE type = 'bead.completed'"))
    assert completed == Counter(ids)
    assert_counted(lambda text: query(dsn, text))
    ended = {(line["bead"], line["token"]) for line in workers.lines("end")}
    closed = query(dsn, "SELECT id, (context ->> 'token')::bigint FROM beads")
    assert set(closed) <= ended
    _assert_cancelled_in_time([line for line in workers.lines() if line["pid"] not in killed])


def _assert_cancelled_in_time(lines: list[dict[str, Any]]) -> None:
    """No handler runs for more than 2 s after its claim was reported as lost."""
    running: dict[tuple[int, str], float | None] = {}
    told = 0
    for line in lines:
        key = line["pid"], line["bead"]
        if line["what"] in ("begin", "resumed"):
            running[key] = None
        elif line["what"] == "lost" and key in running:
            running[key], told = line["at"], told + 1
        elif line["what"] in ("end", "cancelled"):
            lost = running.pop(key, None)
            assert lost is None or line["at"] - lost < 2, line
    print(f"{told} claims were lost while their handlers ran")
    last = max(line["at"] for line in lines)  # the workers are ended then, whatever they do
    assert all(lost is None or last - lost < 2 for lost in running.values()), running


def test_a_handler_that_loses_its_claim_ends_within_two_seconds_and_completes_nothing(cluster: Cluster) -> None:
    client = client_of(cluster)
    team_of(client, "a")
    bead = client.beads.create(title="t", project_id="p")["id"]
    began, ended = threading.Event(), dict[str, float]()

    def plain(task: Task) -> None:
        began.set()
        try:
            while True:
                time.sleep(0.05)
        finally:
            ended["plain"] = time.monotonic()

    worker = client.worker("a", plain, lease_seconds=10)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    assert began.wait(10)
    client.beads.patch(bead, status="closed")  # a person closes it
    closed = time.monotonic()
    wait_until(lambda: "plain" in ended, 10 / 3 + 2 + MARGIN)
    worker.stop()
    thread.join(10)
    assert ended["plain"] - closed < 10 / 3 + 2
    assert worker.done == 0


def test_a_command_of_a_handler_is_killed_with_all_its_children_when_the_claim_is_lost(
    cluster: Cluster, tmp_path: Path
) -> None:
    client = client_of(cluster)
    team_of(client, "a")
    bead = client.beads.create(title="t", project_id="p")["id"]
    file, told = tmp_path / "alive", list[BaseException]()

    def runs(task: Task) -> None:
        try:
            task.run(["sh", "-c", f"trap '' TERM; (trap '' TERM; while :; do echo >>{file}; sleep 0.1; done) & wait"])
        except Cancelled as exc:
            told.append(exc)
            raise

    worker = client.worker("a", runs, lease_seconds=10)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    wait_until(lambda: file.exists() and file.stat().st_size > 2)
    client.redispatch_bead(bead, reason="test")
    client.beads.patch(bead, status="deferred")
    wait_until(lambda: told, 10 / 3 + 2 + MARGIN)
    size = file.stat().st_size
    time.sleep(0.5)
    assert file.stat().st_size == size
    worker.stop()
    thread.join(10)


def test_sigterm_gives_back_what_a_worker_holds_and_a_restarted_worker_resumes_after_a_kill(
    cluster: Cluster, tmp_path: Path, dsn: str
) -> None:
    client, workers = client_of(cluster), Workers(cluster, tmp_path)
    team_of(client, "w")
    beads = [client.beads.create(title="t", project_id="p")["id"] for _ in range(3)]
    process = workers.start("w", 3, 300)
    wait_until(lambda: len(workers.lines("begin")) == 3)
    process.send(signal.SIGTERM)
    assert process.wait(1 + 5 + MARGIN) == 0
    held = "SELECT count(*) FROM beads WHERE status = 'in_progress'"
    assert query(dsn, held) == [(0,)]
    assert query(dsn, "SELECT sum(attempts) FROM beads") == [(0,)]
    process = workers.start("w", 3, 300)
    wait_until(lambda: len(workers.lines("begin")) == 6)
    process.stop(signal.SIGKILL)
    process = workers.start("w", 3, 300)
    wait_until(lambda: len(workers.lines("resumed")) == 3, 5 + MARGIN)  # before the leases are over
    tokens = {line["bead"]: line["token"] for line in workers.lines()}
    before = {line["bead"]: line["token"] for line in workers.lines("begin")}
    assert all(tokens[bead] > before[bead] for bead in beads)  # what the killed one wrote with its tokens is refused
    process.stop(signal.SIGTERM)
    assert query(dsn, "SELECT sum(attempts) FROM beads") == [(0,)]


def test_a_second_process_of_an_agent_takes_over_and_the_first_stops_its_handlers(
    cluster: Cluster, tmp_path: Path
) -> None:
    """A frozen process that was replaced wakes up: the two must not both go on."""
    client, workers = client_of(cluster), Workers(cluster, tmp_path)
    team_of(client, "w")
    client.beads.create(title="t", project_id="p")
    first = workers.start("w", 1, 300)
    wait_until(lambda: workers.lines("begin"))
    with stopped([first.pid]):
        second = workers.start("w", 1, 300)
        wait_until(lambda: workers.lines("resumed"))
    wait_until(lambda: workers.lines("cancelled"), 10 / 3 + 2 + MARGIN)
    assert workers.lines("cancelled")[0]["pid"] == first.pid
    for process in (first, second):
        process.stop(signal.SIGTERM)


def test_a_bead_is_worked_on_as_soon_as_it_is_ready_and_failures_are_told(cluster: Cluster) -> None:
    client = client_of(cluster)
    team_of(client, "a")
    seen = list[tuple[str, float]]()

    def handler(task: Task) -> dict[str, Any] | None:
        seen.append((task.id, time.monotonic()))
        if task.bead["title"] == "bad":
            raise ValueError("no good")
        if task.bead["title"] == "back" and len(seen) < 4:
            raise GiveBack("not now")
        return {"by": "a"}

    worker = client.worker("a", handler)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    wait_until(lambda: client.agents.get("a").get("heartbeat_at"))
    time.sleep(0.5)
    made = time.monotonic()
    one = client.beads.create(title="good", project_id="p")["id"]
    wait_until(lambda: client.beads.get(one)["status"] == "closed")
    assert seen[0][1] - made < 0.5 + MARGIN
    assert client.beads.get(one)["context"] == {"by": "a"}
    two = client.beads.create(title="bad", project_id="p")["id"]
    wait_until(lambda: client.beads.get(two)["failures"] == 1)
    three = client.beads.create(title="back", project_id="p")["id"]
    wait_until(lambda: client.beads.get(three)["status"] == "closed")
    assert client.beads.get(three)["attempts"] == 0
    worker.stop()
    thread.join(5 + MARGIN)
    assert not thread.is_alive()


def test_a_worker_of_an_agent_that_does_not_exist_says_so(cluster: Cluster) -> None:
    with pytest.raises(errors.Invalid, match="nobody"):
        client_of(cluster).work("nobody", lambda task: None)


def test_a_reader_of_events_misses_none_over_restarts_of_itself_the_instances_and_the_database(
    start_cluster: Callable[..., Cluster], own_postgres: Postgres, tmp_path: Path
) -> None:
    dsn = own_postgres.dsn(own_postgres.database())
    cluster = start_cluster(2, dsn=dsn)
    client = client_of(cluster, attempt_timeout=2.0)
    team_of(client)
    made, handled, stop = list[str](), list[int | None](), threading.Event()

    def write() -> None:
        for n in range(60):
            made.append(client.beads.create(title=f"t{n}", project_id="p")["id"])

    def read(count: int) -> None:
        """A reader that dies in the middle of its last event."""
        for event in client.events(store=loom.client.FileCursor(tmp_path / "cursor"), stop=stop):
            handled.append(event.id)
            if len(handled) % count == 0:
                return

    thread = threading.Thread(target=write)
    thread.start()
    read(10)
    cluster.kill(0)
    read(7)
    own_postgres.kill()
    own_postgres.start()
    read(9)
    cluster.kill(1)
    thread.join()
    watch = threading.Timer(60, stop.set)
    watch.start()
    while len(set(handled)) < 61 and not stop.is_set():
        read(5)
    watch.cancel()
    wanted = [key for (key,) in query(dsn, "SELECT id FROM event_numbers ORDER BY id")]
    assert sorted(set(handled)) == wanted
    assert [id for n, id in enumerate(handled) if id not in handled[:n]] == wanted  # in order
