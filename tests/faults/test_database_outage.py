"""Promises 8 and 9: PostgreSQL stopped, killed and restarted under load."""

from __future__ import annotations

import time
from collections.abc import Callable

from harness import Cluster, Postgres
from harness.history import assert_one_holder, grants
from outage import assert_at_once, assert_bounded, assert_healed, identities, loaded


def test_requests_stay_bounded_and_recover_by_themselves_when_the_database_is_stopped_killed_or_restarted(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster], long: bool
) -> None:
    name = own_postgres.database()
    cluster = start_cluster(3, dsn=own_postgres.dsn(name, tcp=True))
    cluster.wait_healthy()
    before = identities(cluster)
    for end, seconds in (
        (own_postgres.stop, 20.0 if long else 6.0),
        (own_postgres.kill, 2.0),
        (own_postgres.stop, 0.0),  # a restart
    ):
        with loaded(cluster) as loads:
            time.sleep(1)
            gone = time.monotonic()
            end()
            time.sleep(seconds)
            back = time.monotonic()  # taken before the start, during which the server may already answer
            own_postgres.start()
            started = time.monotonic()
            assert_healed(cluster, loads, started)
        assert_bounded(loads)
        if seconds:
            assert_at_once(loads, gone, back)
        assert identities(cluster) == before
    for i in range(3):
        for n in range(2):
            assert_one_holder(grants(lambda *query: own_postgres.query(*query, database=name), f"used-{i}-{n}"))
