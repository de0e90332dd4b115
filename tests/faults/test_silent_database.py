"""Promise 9: a database that neither answers nor refuses costs each request its bound once, and then nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from harness import Cluster, PgBouncer, Postgres
from harness.network import Network
from outage import AT_ONCE, HEALED_WITHIN, assert_at_once, assert_bounded, assert_healed, identities, loaded

Silence = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    yield network
    network.close()


def check_silence(cluster: Cluster, silence: Silence, long: bool) -> None:
    """Silence the database under load. More clients than threads: some requests are queued when it falls silent."""
    cluster.wait_healthy()
    before = identities(cluster)
    with loaded(cluster, times=2, pause=0.05) as loads:
        time.sleep(1)
        gone = time.monotonic()
        with silence():
            time.sleep(20 if long else 6.5)
            back = time.monotonic()
        assert_healed(cluster, loads, time.monotonic())
    assert_bounded(loads)
    assert_at_once(loads, gone, back)
    assert identities(cluster) == before


def few_threads(start_cluster: Callable[..., Cluster], dsn: str) -> Cluster:
    return start_cluster(2, dsn=dsn, config="server: {threads: 8}")


@pytest.mark.parametrize("tcp", [True, False], ids=["TCP", "Unix socket"])
def test_requests_are_bounded_when_the_processes_of_the_server_are_stopped(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster], tcp: bool, long: bool
) -> None:
    if not tcp and not long:
        pytest.skip("much like TCP: --long")
    cluster = few_threads(start_cluster, own_postgres.dsn(own_postgres.database(), tcp=tcp))
    check_silence(cluster, own_postgres.frozen, long)


def test_requests_are_bounded_when_the_network_drops_packets(
    network: Network, start_postgres: Callable[..., Postgres], start_cluster: Callable[..., Cluster], long: bool
) -> None:
    server = start_postgres(network=network)
    cluster = few_threads(start_cluster, server.dsn(server.database(), tcp=True))
    check_silence(cluster, network.silent, long)


def test_requests_are_bounded_when_the_server_behind_pgbouncer_is_dead(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster], long: bool
) -> None:
    bouncer = PgBouncer(own_postgres)

    @contextlib.contextmanager
    def dead() -> Iterator[None]:
        own_postgres.kill()
        yield
        own_postgres.start()

    try:
        check_silence(few_threads(start_cluster, bouncer.dsn(own_postgres.database())), dead, long)
    finally:
        bouncer.close()


def test_requests_are_bounded_when_the_server_behind_pgbouncer_is_stopped(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster], long: bool
) -> None:
    if not long:
        pytest.skip("much like the server without it: --long")
    bouncer = PgBouncer(own_postgres)
    try:
        check_silence(few_threads(start_cluster, bouncer.dsn(own_postgres.database())), own_postgres.frozen, long)
    finally:
        bouncer.close()


def test_an_idle_instance_knows_of_an_outage_before_its_next_request(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster], long: bool
) -> None:
    if not long:
        pytest.skip("waits for heartbeats: --long")
    cluster = start_cluster(1, dsn=own_postgres.dsn(own_postgres.database()))
    with own_postgres.frozen():
        time.sleep(12)  # a heartbeat is due after 6 s at most, and cut after 5
        started = time.monotonic()
        assert cluster.client(0).get("/api/v1/locks").status == 503
        assert time.monotonic() - started < AT_ONCE
    cluster.wait_healthy(timeout=HEALED_WITHIN)
