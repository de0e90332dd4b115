"""Promises 3, 4, 6 and 7 together: agents complete beads that depend on each other, while instances and agents die."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from harness import Cluster, Patient, wait_until
from harness.agents import LEASE, Agent, Holding, Plan, make_beads, plan_beads
from harness.client import Methods
from harness.feed import Event, Follower, assert_in_order, differences, follow, replay
from harness.history import PastClaim, assert_one_claimant, claims
from harness.locks import Sql, instant
from harness.work import AGENTS, BEADS, assert_counted, team

AGENT_IDS = [f"a{n}" for n in range(64)]
DEAD_AFTER = 10  # seconds without a heartbeat, the least there is
# Limits that no bead reaches; otherwise random failures would block some.
CONFIG = f"agents: {{dead_after: {DEAD_AFTER}}}\nbeads: {{max_failures: 100, max_attempts: 100}}"
OVERDUE = {"lapsed", "agent-died"}

Strikes = dict[str, Callable[[int], object]]


def strikes(cluster: Cluster, sql: Sql, chance: random.Random, long: bool) -> Strikes:
    """Workers and masters killed, one instance stopped for a while, sessions of the database ended."""

    def kill_master(i: int) -> None:
        cluster.masters[i].send(signal.SIGKILL)
        wait_until(lambda: cluster.health(i) is None, 30)  # its worker leaves by itself
        cluster.start(i)

    def kill_host(i: int) -> None:
        cluster.masters[i].send(signal.SIGKILL)
        cluster.kill(i)
        cluster.start(i)

    def freeze(i: int) -> None:
        with cluster.frozen(i):
            time.sleep(chance.uniform(LEASE + 1, LEASE + 3) if long else chance.uniform(2.5, 4))

    def end_sessions(i: int) -> None:
        sql(
            "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity"
            "  WHERE datname = current_database() AND application_name LIKE 'loom:%%' ORDER BY random() LIMIT %s) AS s",
            chance.randint(1, 3),
        )

    kinds = {"kill": cluster.kill, "freeze": freeze, "end sessions": end_sessions, "kill a master": kill_master}
    return {**kinds, "kill a host": kill_host} if long else kinds


def strike_until(over: Callable[[], bool], kinds: Strikes) -> Counter[str]:
    """Strike in each way in turn, one instance after the other; return how often each was done.

    Runs in the main thread, since a master ends with the thread that started it.
    """
    struck = Counter[str]()
    for n, (kind, strike) in enumerate(itertools.cycle(kinds.items())):
        ends = time.monotonic() + 1.2
        while time.monotonic() < ends:
            if over():
                return struck
            time.sleep(0.2)
        strike(n // len(kinds) % 3)
        struck[kind] += 1
    raise AssertionError


@pytest.mark.usefixtures("server_age")  # in the first minute after the start of the server nobody is declared dead
def test_64_agents_complete_each_bead_exactly_once_whatever_dies(
    start_cluster: Callable[..., Cluster], sql: Sql, seed: int, long: bool
) -> None:
    count, limit, work = (20_000, 900, 0.1) if long else (1_500, 180, 0.2)
    chance = random.Random(seed)
    cluster = start_cluster(3, nginx=True, config=CONFIG)
    cluster.wait_healthy()
    client = Patient([cluster.nginx_url])
    team(client, *AGENT_IDS)
    plans, turns = plan_beads(count, chance), itertools.count()
    agents = [Agent(cluster.nginx_url, name, seed, work, turns, count * 2 // 3) for name in AGENT_IDS]
    follower = Follower([cluster.nginx_url], limit=200)
    follower.start()

    def drained() -> bool:
        assert time.monotonic() < began + limit, sql("SELECT status, count(*) FROM beads GROUP BY 1")
        done = sql("SELECT count(*) FROM beads WHERE status = 'closed'") == [(count,)]
        return done or any(thread.done() for thread in working) or (making.done() and making.exception() is not None)

    began, cpu = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(len(agents) + 1) as pool:
        working = [pool.submit(agent.run) for agent in agents]
        making = pool.submit(make_beads, Patient([cluster.nginx_url]), plans)
        try:
            struck = strike_until(drained, strikes(cluster, sql, chance, long))
        finally:
            for agent in agents:
                agent.stop()
        ids = making.result()
        for thread in working:
            thread.result()
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    sql("UPDATE agents SET heartbeat_at = NULL")  # without heartbeats, they would be declared dead one by one
    follower.stop()

    past = claims(sql)
    held = [holding for agent in agents for holding in agent.held]
    ends = Counter(claim.ended_how for claim in itertools.chain(*past.values()))
    lost = sum((agent.client.lost for agent in agents), Counter[str]())
    print(
        f"{count} beads in {seconds:.0f} s ({cpu:.0f} s of CPU for the agents), {len(held)} claims: {dict(ends)};"
        f" {dict(struck)}; answers that did not come: {dict(lost)}; {len(follower.seen)} events"
    )
    beads = {bead["id"]: bead for bead in everything(client, BEADS)}
    assert_planned(beads, ids, plans)
    assert_completed_once(beads, past)
    assert_as_told(held, past)
    assert_none_too_early(plans, ids, past, follower.seen)
    assert_attempts_counted(beads, past, held)
    assert_counted(sql)
    assert sql("SELECT sum(open_claims) FROM agents") == [(0,)]

    replayed = list(follow(client, limit=1000))
    assert follower.seen == replayed
    assert sql("SELECT count(*) FROM events") == [(len(replayed),)]
    assert_in_order(replayed)
    assert_reproduced(replayed, {"bead": beads.values(), "agent": everything(client, AGENTS)})

    assert ends.keys() == {"completed", "failed", "released", *OVERDUE}
    assert lost.total() > 0
    assert Counter(holding.fate for holding in held if holding.ended_how in OVERDUE)["oversleep"] > 1
    assert Counter(holding.fate for holding in held if holding.ended_how == "completed")["stay"] > 1
    assert all(struck[kind] >= 1 for kind in strikes(cluster, sql, chance, long)), struck


def everything(client: Methods, path: str) -> list[dict[str, Any]]:
    """Return all rows of a list, page by page."""
    found, link = [], f"<{path}?limit=1000>"
    while link:
        answer = client.get(link[1 : link.index(">")])
        assert answer.status == 200, answer
        found += answer.json
        link = answer.headers.get("Link", "")
    return found


def assert_planned(beads: dict[str, dict[str, Any]], ids: Sequence[str], plans: Sequence[Plan]) -> None:
    """Each bead was created once, with its planned dependencies."""
    assert len(set(ids)) == len(ids)
    assert beads.keys() == set(ids)
    for plan in plans:
        bead = beads[ids[plan.number]]
        assert (bead["title"], bead["priority"]) == (f"t{plan.number}", plan.priority)
        assert bead.get("due_date") == plan.due_date
        assert bead.get("blocked_by", []) == [ids[other] for other in plan.blocked_by]
        assert bead.get("parent") == (None if plan.parent is None else ids[plan.parent])


def assert_completed_once(beads: dict[str, dict[str, Any]], past: dict[str, list[PastClaim]]) -> None:
    """Each bead was completed by its last claim, before that lease ended, with the values that its agent sent."""
    assert {bead["status"] for bead in beads.values()} == {"closed"}
    assert beads.keys() == past.keys()
    for bead in beads.values():
        *former, last = past[bead["id"]]
        assert_one_claimant(past[bead["id"]])
        assert last.ended_how == "completed"
        assert "completed" not in [claim.ended_how for claim in former]
        assert instant(bead["closed_at"]) < last.expires_at
        assert (bead["close_reason"], bead["context"]) == (f"by {last.agent}", {"token": str(last.token)})


def assert_as_told(held: Sequence[Holding], past: dict[str, list[PastClaim]]) -> None:
    """Every claim had one agent, which was told correctly how it ended; none was ended before its lease."""
    by_token = {claim.token: claim for claim in itertools.chain(*past.values())}
    assert sorted(holding.token for holding in held) == sorted(by_token)
    for holding in held:
        claim = by_token[holding.token]
        assert (claim.bead, claim.agent) == (holding.bead, holding.agent)
        assert holding.promised is None or claim.expires_at >= holding.promised
        if holding.ended_how is None:
            assert holding.fate in ("vanish", "die"), holding
            assert claim.ended_how in OVERDUE
        else:
            assert claim.ended_how == holding.ended_how, holding
        if claim.ended_how == "agent-died":
            assert claim.ended_at >= claim.claimed_at + timedelta(seconds=DEAD_AFTER)


def assert_none_too_early(
    plans: Sequence[Plan], ids: Sequence[str], past: dict[str, list[PastClaim]], events: Iterable[Event]
) -> None:
    """No bead was claimed before all that it waits for was completed: by the database's clock, and in the feed."""
    waits_for = {ids[plan.number]: {ids[other] for other in plan.waits_for} for plan in plans}
    for bead, others in waits_for.items():
        for other in others:
            assert past[other][-1].ended_at <= past[bead][0].claimed_at, f"{bead} was claimed before {other} was closed"
    completed: set[str] = set()
    for event in events:
        if event["type"] in ("bead.assigned", "bead.completed"):
            assert waits_for[event["entity_id"]] <= completed, event
        if event["type"] == "bead.completed":
            assert event["entity_id"] not in completed, event
            completed.add(event["entity_id"])
    assert len(completed) == len(plans)


def assert_attempts_counted(
    beads: dict[str, dict[str, Any]], past: dict[str, list[PastClaim]], held: Iterable[Holding]
) -> None:
    """`attempts` and `failures` equal those of the past claims, and those that the agents were told of."""
    failed = Counter(holding.bead for holding in held if holding.ended_how == "failed")
    overdue = Counter(holding.bead for holding in held if holding.ended_how in {None, *OVERDUE})
    for bead in beads.values():
        key = bead["id"]
        ended = Counter(claim.ended_how for claim in past[key])
        assert bead["failures"] == ended["failed"] == failed[key]
        assert bead["attempts"] == ended["failed"] + sum(ended[how] for how in OVERDUE) == failed[key] + overdue[key]


def assert_reproduced(events: Iterable[Event], entities: dict[str, Iterable[dict[str, Any]]]) -> None:
    """Replaying the feed gives each entity as GET answers it."""
    made = replay(events)
    for kind, found in entities.items():
        for entity in found:
            assert differences(made[kind, entity["id"]], entity) == {}
