"""/metrics: what this instance counts, its state, and the totals of the cluster, for Prometheus."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain

from flask import Blueprint, Response
from prometheus_client import Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from loom import __version__, db, errors, instances, log, metrics
from loom.http import siblings
from loom.http.application import Application
from loom.http.pollers import Pollers, pollers
from loom.state import request_rows
from loom.totals import totals

bp = Blueprint("metrics", __name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
KEPT = 10.0  # seconds for which the totals of the cluster are kept, so that scrapes do not count them again and again
SHARE_PERIOD = 5.0  # seconds between two times at which a worker leaves its metrics for its siblings
SECONDS = 2.0  # for the statement, and for which a scrape waits for another that counts; Prometheus gives up after 10


class Totals:
    """The totals of the cluster, over a connection of its own: the pool may be in use when they are wanted most."""

    def __init__(self, database: db.Database) -> None:
        self.database = database
        self._connection = database.dedicated("metrics")
        self._lock = threading.Lock()
        self._row: db.Row | None = None
        self._counted = float("-inf")
        self._dead: set[str] | None = None

    def get(self) -> db.Row | None:
        """The totals, at most KEPT seconds old; None without a database, since old numbers would look like new ones."""
        if self.database.away is not None:
            self._row, self._counted = None, float("-inf")
            return None
        # One thread counts. The others answer its former totals or, without any, wait for it.
        if self._lock.acquire(timeout=0 if self._row else SECONDS):
            try:
                if time.monotonic() - self._counted > KEPT:
                    self._row = self._count()
                    self._counted = time.monotonic()
            finally:
                self._lock.release()
        return self._row

    def _count(self) -> db.Row | None:
        try:
            with self._connection.use(SECONDS) as conn:
                row = totals(conn)
        except errors.Error:
            return None
        dead = set(row["dead_instances"])
        for _ in dead - (dead if self._dead is None else self._dead):
            metrics.count_failover("instance_died")
        self._dead = dead
        return row

    def close(self) -> None:
        self._connection.close()


_totals: Totals | None = None


def _cluster() -> db.Row | None:
    global _totals
    with contextlib.suppress(errors.Unavailable):  # no database has been opened in this process
        database = db.default()
        if _totals is None or _totals.database is not database:
            if _totals is not None:
                _totals.close()
            _totals = Totals(database)
        return _totals.get()
    return None


class Labelled(Collector):
    """Some metrics, each sample with the label instance_id."""

    def __init__(self, collected: Iterable[Metric]) -> None:
        self._collected = collected

    def collect(self) -> Iterator[Metric]:
        own = {} if instances.current is None else {"instance_id": instances.current.instance_id}
        for family in self._collected:
            family.samples = [s._replace(labels={**own, **s.labels}) for s in family.samples]
            yield family


def _text(collected: Iterable[Metric]) -> str:
    return generate_latest(Labelled(collected)).decode()


def _own_text(waiting: Pollers) -> str:
    return _text(chain(metrics.REGISTRY.collect(), _of_instance(waiting)))


@bp.get("/metrics")
def scrape() -> Response:
    cluster = _cluster()  # first: it counts events
    text = siblings.with_siblings(siblings.share(partial(_own_text, pollers())))
    return Response(text + (_text(_of_cluster(cluster)) if cluster else ""), content_type=CONTENT_TYPE)


def share_regularly(app: Application) -> None:
    """In a worker that has siblings."""

    def run() -> None:
        while True:
            siblings.share(partial(_own_text, app.pollers))
            time.sleep(SHARE_PERIOD)

    threading.Thread(target=run, name="metrics", daemon=True).start()


def _gauge(name: str, text: str, value: float | dict[str, float], label: str = "") -> Metric:
    """One gauge; `value` may be a number for each value of a label."""
    family = GaugeMetricFamily(name, text, labels=[label] if label else [])
    for key, number in value.items() if isinstance(value, dict) else [("", value)]:
        family.add_metric([key] if label else [], number)
    return family


def _of_instance(waiting: Pollers) -> Iterator[Metric]:
    me = instances.current
    yield InfoMetricFamily("loom_build", "The version of Loom.", {"version": __version__})
    if me is not None:
        yield _gauge("loom_heartbeat_age_seconds", "Since the last heartbeat that succeeded.", me.heartbeat_age)
        yield _gauge("loom_draining", "1 while this instance is about to leave.", me.draining)
    number = {"locks": float(waiting.locks.waiting), "events": float(waiting.events.waiting)}
    yield _gauge("loom_waiting_requests", "Requests that wait for a lock, or for events.", number, "for")
    rows = request_rows.current
    logs = {**log.usage(), **({} if rows is None else {"request_logs": rows.usage()})}
    queued = {target: float(each["queued"]) for target, each in logs.items()}
    yield _gauge("loom_log_queued", "Log lines, and rows of requests, that wait to be written.", queued, "target")
    lost = CounterMetricFamily("loom_log_dropped", "Log lines, and rows of requests, that are lost.", labels=["target"])
    for target, each in logs.items():
        lost.add_metric([target], each["dropped"])
    yield lost
    with contextlib.suppress(errors.Unavailable):
        database = db.default()
        usage = database.usage()
        yield _gauge("loom_database_up", "1 unless the database is away.", database.away is None)
        yield _gauge("loom_db_connections_max", "The size of the pool of connections.", usage["max"])
        use = {"idle": float(usage["idle"]), "in_use": float(usage["open"] - usage["idle"])}
        yield _gauge("loom_db_connections", "Open connections of the pool.", use, "state")
        yield _gauge("loom_db_connections_waiting", "Requests that wait for a connection.", usage["waiting"])


def _of_cluster(cluster: db.Row) -> Iterator[Metric]:
    """The same at each instance: take max() of them, not sum()."""
    yield _gauge("loom_active_instances", "Active instances of the cluster.", cluster["active_instances"])
    yield _gauge("loom_dead_instances", "Instances that died in the last minutes.", len(cluster["dead_instances"]))
    yield _gauge("loom_locks_held", "Locks that are held, in the cluster.", cluster["locks_held"])
    yield _gauge("loom_lock_waiters", "Places in the queues for locks, in the cluster.", cluster["lock_waiters"])
    by_status = {status: cluster[status] for status in ("open", "in_progress", "blocked")}
    yield _gauge("loom_beads", "Beads that are not closed, by status.", by_status, "status")
    yield _gauge("loom_beads_ready", "Open beads that an agent could claim now.", cluster["ready"])
    yield _gauge(
        "loom_event_lag_seconds", "Age of the oldest event that has no place in the feed.", cluster["event_lag"]
    )
