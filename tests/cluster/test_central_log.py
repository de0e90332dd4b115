"""The requests of all instances are in one table, and no outage or shutdown loses a row of them."""

from __future__ import annotations

import signal
from collections.abc import Callable

from harness import Cluster, Postgres, wait_until
from harness.postgres import query


def test_every_request_is_there_once_after_an_outage_and_an_orderly_end(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster]
) -> None:
    dsn = own_postgres.dsn(own_postgres.database(), tcp=True)
    cluster = start_cluster(2, dsn=dsn)
    cluster.wait_healthy()

    def ask(i: int, times: int) -> None:
        for _ in range(times):
            cluster.client(i).get(f"/api/v1/beads/b-{i}")

    def stored(i: int) -> list[tuple[int, int]]:
        found = "SELECT status_code, count(*) FROM request_logs WHERE bead_id = %s GROUP BY 1 ORDER BY 1"
        return query(dsn, found, f"b-{i}")

    ask(0, 20)
    ask(1, 20)
    wait_until(lambda: stored(0) == stored(1) == [(404, 20)])
    own_postgres.stop()
    wait_until(lambda: not (cluster.health(0) or {})["healthy"])
    ask(0, 30)
    own_postgres.start()
    cluster.wait_healthy()
    wait_until(lambda: stored(0) == [(404, 20), (503, 30)])
    ask(1, 50)
    cluster.masters[1].stop(signal.SIGTERM, 40)
    assert stored(1) == [(404, 70)]
    instances = "SELECT count(DISTINCT instance_id), min(timestamp) > now() - INTERVAL '1 hour' FROM request_logs"
    assert query(dsn, instances) == [(2, True)]
    assert [master.log.read_text().count("request-rows") for master in cluster.masters] == [0, 0]
