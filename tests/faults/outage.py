"""Promises 8 and 9 under load: what an outage of the database may cost a request, and how soon it is over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from harness import MARGIN, Cluster
from harness.load import Job, Load, get, use_lock

BOUND = 5.0  # seconds: database.timeout
AT_ONCE = 0.5  # seconds, for what is refused without asking the database
HEALED_WITHIN = 5.0 + MARGIN  # seconds after the database is back
GOOD = {200, 201, 204, 409}


def jobs(i: int, times: int = 1) -> list[Job]:
    """Every kind of request, each lock used by one job alone."""
    reads = [get("/health"), get("/health/live"), get("/health/ready"), get("/api/v1/locks"), get("/api/v1/grants")]
    return [*reads, *(use_lock(f"used-{i}-{n}", ttl_seconds=1) for n in range(2))] * times


@contextlib.contextmanager
def loaded(cluster: Cluster, times: int = 1, pause: float = 0.03) -> Iterator[list[Load]]:
    """Put load on each instance while the block runs: seven clients, `times` over."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Load([port], jobs(i, times), pause)) for i, port in enumerate(cluster.ports)]


def identities(cluster: Cluster) -> list[tuple[int, str]]:
    """Of each instance: the worker's process number and the instance's id."""
    found = []
    for i in range(len(cluster.ports)):
        health = cluster.health(i)
        assert health is not None
        found.append((cluster.pid(i), health["instance_id"]))
    return found


def first_refusal(load: Load) -> float:
    """When the first 503 had been answered."""
    return min(call.ended for call in load.calls if call.status == 503)


def assert_bounded(loads: list[Load]) -> None:
    """Every request was answered within the bound, by success or 503, and /health/live always by 200."""
    for load in loads:
        assert [call for call in load.calls if call.status not in GOOD | {503}] == []
        assert [call for call in load.calls if call.seconds > BOUND + MARGIN] == []
        assert [call for call in load.calls if call.what == "GET /health/live" and call.status != 200] == []


def assert_at_once(loads: list[Load], gone: float, back: float) -> None:
    """From each instance's first 503 on, until the database was back, no request waited for it."""
    for load in loads:
        during = [call for call in load.calls if call.at > first_refusal(load) and call.ended < back]
        assert len(during) > 20, "the load saw nothing of the outage"
        assert {call.status for call in during if call.what != "GET /health/live"} == {503}
        slow = [call for call in during if call.seconds > AT_ONCE]
        assert len(slow) * 20 <= len(during), slow  # one in twenty: other tests use these cores, too
    print(f"first 503 after {max(first_refusal(load) - gone for load in loads):.2f} s", end=", ")


def assert_healed(cluster: Cluster, loads: list[Load], back: float) -> None:
    """Soon after `back` every instance serves, and goes on serving. Waits for that, under the load."""
    cluster.wait_healthy(timeout=HEALED_WITHIN)
    time.sleep(1)
    for load in loads:
        refused = [call for call in load.calls if call.status == 503 and call.at > back]
        assert max((call.at - back for call in refused), default=0.0) < HEALED_WITHIN
        assert [call for call in load.calls if call.at > back and call.status in GOOD]
    last = max((call.at for load in loads for call in load.calls if call.status == 503), default=back)
    print(f"last 503 {last - back:.2f} s after the return")
