"""Promise 8: an instance killed under load costs no read, is known to be dead at once, and is replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

from harness import MARGIN, Cluster, wait_until
from harness.load import Call, Load, get, use_lock
from harness.locks import Sql

READS = [get("/api/v1/locks"), get("/api/v1/instances"), get("/health"), get("/health/live")] * 3
WRITES = [use_lock(f"used-{i}") for i in range(3)]
GONE_WITHIN, REPLACED_WITHIN = 2.0 + MARGIN, 5.0 + MARGIN  # seconds


def failed_reads(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.what.startswith("GET") and call.status != 200]


def kill_and_watch(cluster: Cluster, i: int) -> None:
    """Kill worker i; wait until another instance no longer lists it as active, and until its replacement serves."""
    before, other = cluster.health(i), cluster.client((i + 1) % 3)
    assert before is not None

    def listed() -> bool:
        rows = other.get("/api/v1/instances").json
        return (before["instance_id"], "active") in [(row["instance_id"], row["status"]) for row in rows]

    def replaced() -> bool:
        after = cluster.health(i)
        return after is not None and after["healthy"] and after["instance_id"] != before["instance_id"]

    assert listed()
    cluster.kill(i)
    wait_until(lambda: not listed(), GONE_WITHIN)
    wait_until(replaced, REPLACED_WITHIN)
    assert cluster.health(i)["active_instances"] == 3  # type: ignore[index]


def test_no_read_fails_when_a_worker_is_killed_and_replaced(start_cluster: Callable[..., Cluster], long: bool) -> None:
    cluster = start_cluster(3, nginx=True)
    cluster.wait_healthy()
    with Load([cluster.nginx_url], READS + WRITES, pause=0.01) as load:
        for i in [0, 1, 2] * (6 if long else 1):
            time.sleep(0.3)
            kill_and_watch(cluster, i)
    reads = [call for call in load.calls if call.what.startswith("GET")]
    print(f"{len(reads)} reads, slowest {max(call.seconds for call in reads):.2f} s")
    assert failed_reads(load.calls) == []
    assert len(reads) > 500


def test_no_read_fails_when_a_master_or_a_whole_host_is_killed(start_cluster: Callable[..., Cluster], sql: Sql) -> None:
    """Without its master a worker leaves by itself; when both die at once, the age of the heartbeat shows it."""
    cluster = start_cluster(3, nginx=True)
    cluster.wait_healthy()
    ids = [cluster.health(i)["instance_id"] for i in range(3)]  # type: ignore[index]
    with Load([cluster.nginx_url], READS + WRITES, pause=0.01) as load:
        time.sleep(0.3)
        cluster.masters[0].send(signal.SIGKILL)
        wait_until(lambda: sql("SELECT 1 FROM instances WHERE instance_id = %s", ids[0]) == [], 5 + MARGIN)
        assert cluster.health(2)["active_instances"] == 2  # type: ignore[index]
        os.kill(cluster.pid(1), signal.SIGSTOP)  # so that it cannot see its master go
        cluster.masters[1].send(signal.SIGKILL)
        cluster.kill(1)
        time.sleep(1)
        sql("UPDATE instances SET last_heartbeat = last_heartbeat - INTERVAL '1 minute' WHERE instance_id = %s", ids[1])
        assert cluster.health(2)["active_instances"] == 1  # type: ignore[index]
        for i in (0, 1):
            cluster.start(i)
        cluster.wait_healthy(timeout=REPLACED_WITHIN)
        time.sleep(0.3)
    assert failed_reads(load.calls) == []
