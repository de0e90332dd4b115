"""However many ask at once: a bead has one agent, an agent no more than it may, and every count is right."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.client import Answer
from harness.locks import Sql, assert_problem
from harness.work import (
    AGENTS,
    BEADS,
    PROJECT,
    ask,
    assert_counted,
    bead,
    claim_next,
    complete,
    fail,
    get,
    lapse,
    release,
    team,
)

from loom.config import AgentsConfig, BeadsConfig, Config
from loom.instances import Instance
from loom.upkeep import Upkeep

AGENT_IDS = [f"a{n}" for n in range(32)]


@pytest.fixture
def work(client: AppClient) -> AppClient:
    """A client, with a project and 32 agents."""
    team(client, *AGENT_IDS)
    return client


def together(count: int, do: Callable[[int], Any]) -> list[Any]:
    """What `do(0)`, `do(1)`, ... return that begin at the same time."""
    begin = threading.Barrier(count)

    def run(n: int) -> Any:
        begin.wait()
        return do(n)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def test_of_many_that_race_for_a_bead_one_has_it(work: AppClient, sql: Sql) -> None:
    for n in range(8):
        bead(work, f"x{n}")
        answers: list[Answer] = together(32, lambda i, n=n: ask(work, f"x{n}", AGENT_IDS[i]))
        (winner,) = [a.json["bead"]["assigned_to"] for a in answers if a.status == 200]
        losers = [a.json for a in answers if a.status != 200]
        assert {(a["type"], a["holder"]["agent_id"]) for a in losers} == {("/problems/bead-claimed", winner)}
        assert get(work, f"x{n}")["assigned_to"] == winner
    assert_counted(sql)


def test_the_last_free_slot_of_an_agent_is_given_once(work: AppClient, sql: Sql) -> None:
    work._app.config["LOOM"] = Config(agents=AgentsConfig(max_concurrent=1))
    for n in range(8):
        bead(work, f"x{n}")
    for _ in range(30):
        answers = together(
            8, lambda i: ask(work, f"x{i}", "a0") if i % 2 else work.post(f"{BEADS}/claim", {"agent_id": "a0"})
        )
        (won,) = [a.json for a in answers if a.status == 200]
        busy = [a.json for a in answers if a.status != 200]
        assert {(a["type"], *a["beads"]) for a in busy} == {("/problems/agent-busy", won["bead"]["id"])}
        assert release(work, won["bead"]["id"], won["fencing_token"]).status == 204
    assert_counted(sql)


def test_no_bead_is_given_twice_and_each_agent_gets_the_urgent_ones_first(work: AppClient, sql: Sql) -> None:
    work._app.config["LOOM"] = Config(agents=AgentsConfig(max_concurrent=1000))
    sql(
        "INSERT INTO beads (id, title, project_id, priority, created_at)"
        " SELECT 'x' || i, 't', %s, i %% 4, now() - i * INTERVAL '1 ms' FROM generate_series(1, 300) AS i",
        PROJECT,
    )

    def drain(n: int) -> list[str]:
        return list(iter(lambda: claim_next(work, AGENT_IDS[n]), None))

    got = together(8, drain)
    assert sorted(key for mine in got for key in mine) == sorted(f"x{i}" for i in range(1, 301))
    order = [key for (key,) in sql("SELECT id FROM beads ORDER BY priority, created_at")]
    places = {key: place for place, key in enumerate(order)}
    assert [sorted(mine, key=places.__getitem__) for mine in got] == got
    assert_counted(sql)


def test_claims_that_have_lapsed_are_opened_once_however_many_look(work: AppClient, sql: Sql) -> None:
    """Each of them opens what others had: whose agents' rows they would lock in different orders."""
    work._app.config["LOOM"] = Config(beads=BeadsConfig(max_attempts=1000))
    for n in range(16):
        bead(work, f"x{n}")
    before = sql("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    for _ in range(10):
        together(16, lambda n: claim_next(work, AGENT_IDS[n]))
        lapse(sql, *(f"x{n}" for n in range(16)))
    together(16, lambda n: claim_next(work, AGENT_IDS[n]))
    ended = sql("SELECT bead_id, count(*) FROM claims WHERE ended_how = 'lapsed' GROUP BY 1")
    assert dict(ended) == dict(sql("SELECT id, attempts FROM beads"))
    assert sql("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == before
    assert_counted(sql)


def test_who_stops_waiting_while_what_it_waited_for_is_closed_is_counted_right(
    work: AppClient, sql: Sql, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    """Both by hand: over HTTP the lock on the graph keeps them apart."""
    for key in ("x", "y"):
        bead(work, key)
    bead(work, "waits", blocked_by=["x", "y"])
    with ThreadPoolExecutor(1) as thread, session() as conn:
        conn.cursor().execute("UPDATE beads SET blocked_by = '{y}' WHERE id = 'waits'")
        closing = thread.submit(sql, "UPDATE beads SET status = 'closed' WHERE id = 'x'")
        wait_until(lambda: sql("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        conn.commit()
        closing.result()
    assert sql("SELECT open_blockers FROM beads WHERE id = 'waits'") == [(1,)]
    assert_counted(sql)


def test_no_parent_is_completed_over_a_child_that_was_open_before(
    work: AppClient, sql: Sql, seed: int, long: bool
) -> None:
    """The child is created, reopened or moved at the same time. A lock orders the two, and so their events."""
    chance = random.Random(seed)
    adopt: dict[str, Callable[[str], Answer]] = {
        "created": lambda x: work.post(BEADS, {"id": f"{x}-c", "title": "t", "project_id": PROJECT, "parent": x}),
        "reopened": lambda x: work.patch(f"{BEADS}/{x}-c", {"status": "open"}),
        "moved": lambda x: work.patch(f"{BEADS}/{x}-c", {"parent": x}),
    }
    orders: Counter[tuple[str, int]] = Counter()
    lead = dict.fromkeys(adopt, 0.0)  # seconds by which the completion begins earlier: what came second gets more
    for n in range(1500 if long else 90):
        how, x = list(adopt)[n % len(adopt)], f"x{n}"
        bead(work, x)
        if how == "reopened":
            bead(work, f"{x}-c", parent=x, status="closed")
        elif how == "moved":
            bead(work, f"{x}-c")
        token = work.post(f"{BEADS}/{x}/claim", {"agent_id": "a0"}).json["fencing_token"]
        ahead = lead[how] + chance.uniform(-0.001, 0.001)

        def one(i: int, x: str = x, how: str = how, token: int = token, ahead: float = ahead) -> Answer:
            time.sleep(max(0, ahead if i else -ahead))
            return adopt[how](x) if i else complete(work, x, token)

        completed, adopted = together(2, one)
        assert adopted.status in (200, 201), adopted
        orders[how, completed.status] += 1
        lead[how] += 0.001 if completed.status == 409 else -0.001
        if completed.status == 200:
            (closed,) = sql("SELECT max(place) FROM events WHERE entity_id = %s AND type = 'bead.completed'", x)
            (opened,) = sql("SELECT max(place) FROM events WHERE entity_id = %s", f"{x}-c")
            assert closed < opened, (how, n)
        else:
            assert_problem(completed, 409, "open-children", children=[f"{x}-c"])
            assert work.patch(f"{BEADS}/{x}-c", {"status": "closed"}).status == 200
            assert complete(work, x, token).status == 200, "the claim went on"
    print(sorted(orders.items()))
    assert len(orders) == 2 * len(adopt), "both orders of each"
    assert_counted(sql)
    assert sql("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


class Storm:
    """Random calls and changes by hand of one thread, by a seed."""

    def __init__(self, client: AppClient, dsn: str, upkeep: Upkeep, ids: list[str], seed: int, number: int) -> None:
        """`ids`: of the beads that all are at; who deletes one puts another in its place."""
        self.client, self.upkeep, self.ids = client, upkeep, ids
        self.random, self.number = random.Random(f"{seed} {number}"), number
        self.conn = psycopg2.connect(dsn) if dsn else None
        self.made = 0
        self.held: dict[str, int] = {}
        self.answers: Counter[str] = Counter()

    def bead(self) -> str:
        if self.held and self.random.random() < 0.5:
            return self.random.choice(sorted(self.held))
        return self.random.choice(self.ids)

    def agent(self) -> str:
        return AGENT_IDS[self.random.randrange(4)]

    def note(self, what: str, answer: Answer) -> Answer:
        # `busy`: it would have had to wait for too long for a bead that all of them want.
        assert answer.status < 500 or answer.json["type"] == "/problems/busy", (what, answer)
        self.answers[f"{what} {answer.status}"] += 1
        return answer

    def by_hand(self, sql: str, *params: Any) -> None:
        """In psql a deadlock, a cycle and a check are the operator's to see."""
        if self.conn is not None:
            with contextlib.suppress(psycopg2.Error), self.conn, self.conn.cursor() as cursor:
                cursor.execute(sql, params)

    def step(self) -> None:
        do = self.random.choices(
            [
                self.claim,
                self.claim_next,
                self.end,
                self.beat,
                self.patch,
                self.link,
                self.delete,
                self.lapse,
                self.die,
            ],
            [5, 8, 12, 3, 4, 4, 1, 2, 0.5],
        )[0]
        do()

    def claim(self) -> None:
        key = self.bead()
        answer = self.note("claim", ask(self.client, key, self.agent()))
        if answer.status == 200:
            self.held[key] = answer.json["fencing_token"]

    def claim_next(self) -> None:
        answer = self.note("claim-next", self.client.post(f"{BEADS}/claim", {"agent_id": self.agent()}))
        if answer.status == 200:
            self.held[answer.json["bead"]["id"]] = answer.json["fencing_token"]

    def end(self) -> None:
        if not self.held:
            return
        key, token = self.held.popitem()
        what = self.random.choice(["complete", "fail", "release"])
        if what == "complete":
            self.note(what, complete(self.client, key, token))
        elif what == "fail":
            self.note(what, fail(self.client, key, token, retry_after_seconds=0))
        else:
            self.note(what, release(self.client, key, token))

    def beat(self) -> None:
        answer = self.client.post(f"{AGENTS}/{self.agent()}/heartbeat", {"claims": self.held})
        self.note("heartbeat", answer)

    def patch(self) -> None:
        status = self.random.choice(["open", "open", "open", "closed", "blocked", "in_progress"])
        change = self.random.choice(
            [{"status": status}, {"assigned_to": self.agent()}, {"assigned_to": None}, {"priority": 0}]
        )
        self.note("patch", self.client.request("PATCH", f"{BEADS}/{self.bead()}", change))

    def link(self) -> None:
        others = self.random.sample(self.ids, self.random.randrange(3))
        change = self.random.choice([{"blocked_by": others}, {"parent": others[0] if others else None}])
        self.note("link", self.client.request("PATCH", f"{BEADS}/{self.bead()}", change))

    def delete(self) -> None:
        place = self.random.randrange(len(self.ids))
        if self.conn is None or self.random.random() < 0.5:
            self.note("delete", self.client.delete(f"{BEADS}/{self.ids[place]}"))
        else:
            self.by_hand("DELETE FROM beads WHERE id = %s", self.ids[place])
        self.made += 1
        given = {"id": f"n{self.number}-{self.made}", "title": "t", "project_id": PROJECT}
        links = {"blocked_by": [self.random.choice(self.ids)], "parent": self.random.choice(self.ids)}
        if self.note("create", self.client.post(BEADS, {**given, **links})).status != 201:
            self.note("create", self.client.post(BEADS, given))
        self.ids[place] = given["id"]

    def lapse(self) -> None:
        self.by_hand(
            self.random.choice(
                [
                    "UPDATE beads SET lease_expires_at = clock_timestamp() WHERE id = %s AND fencing_token IS NOT NULL",
                    "UPDATE beads SET status = 'open' WHERE id = %s",
                    "UPDATE beads SET status = 'closed' WHERE id = %s",
                    "UPDATE beads SET assigned_to = NULL WHERE id = %s",
                    "UPDATE beads SET fencing_token = NULL WHERE id = %s",
                ]
            ),
            self.bead(),
        )

    def die(self) -> None:
        if self.random.random() < 0.5:
            self.by_hand("UPDATE agents SET status = 'dead' WHERE id = %s", self.agent())
        else:
            self.note("agent", self.client.request("PATCH", f"{AGENTS}/{self.agent()}", {"status": "dead"}))
        self.upkeep.clean()


@pytest.mark.parametrize("by_hand", [True, False])
def test_every_count_is_right_after_a_storm(
    work: AppClient, sql: Sql, dsn: str, instance: Instance, seed: int, long: bool, by_hand: bool
) -> None:
    config = Config(agents=AgentsConfig(max_concurrent=6), beads=BeadsConfig(max_failures=50, max_attempts=200))
    work._app.config["LOOM"] = config
    ids = [bead(work, f"x{n}", priority=n % 4)["id"] for n in range(24)]
    hand = dsn if by_hand else None
    storms = [Storm(work, hand, Upkeep(config, instance), ids, seed, n) for n in range(8)]

    def rage(n: int) -> None:
        for _ in range(1000 if long else 100):
            storms[n].step()

    together(8, rage)
    total = sum((storm.answers for storm in storms), Counter())
    print(sorted(total.items()))
    assert total["claim-next 200"] > 20
    assert_counted(sql)
    assert sql("SELECT id FROM agents WHERE open_claims > 6") == []
    given = sql("SELECT changes -> 'fencing_token' FROM events WHERE changes ->> 'fencing_token' IS NOT NULL")
    now = sql("SELECT fencing_token FROM claims UNION SELECT fencing_token FROM beads WHERE fencing_token IS NOT NULL")
    assert sorted(given) == sorted(now)
    if not by_hand:  # all take their locks in one order
        assert sql("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]
