"""Counts the requests, and times them: by route, method and status."""

from __future__ import annotations

import re
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from flask import Request, request
from prometheus_client import Histogram, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from loom.http.pollers import RECEIVED
from loom.metrics import OTHER, REGISTRY
from loom.traffic import Traffic

STARTED = "loom.started"  # in the environ: time.monotonic() when the request arrived; it may be run more than once
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNMATCHED = "unmatched"  # the route of a request that no route serves
ACQUIRE = "/api/v1/locks/{name}", "POST"
EVENTS = "/api/v1/events"
ACQUIRE_OUTCOMES = {201: "acquired", 200: "extended", 409: "refused"}
BOUNDS = (0.005, 0.025, 0.1, 0.5, 2.5, 10.0)  # seconds, of the buckets of all requests

_acquire = Histogram(
    "loom_lock_acquire_seconds",
    "From the arrival of a request for a lock to its answer, with the time for which it waited.",
    ["outcome"],
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=REGISTRY,
)
for _outcome in (*ACQUIRE_OUTCOMES.values(), "error"):
    _acquire.labels(_outcome)


class Tally:
    """The requests of one route, method and status. A Counter and a Histogram took 2 us a request, this takes 0.5."""

    def __init__(self, route: str, method: str, status: int) -> None:
        self.route, self.method, self.status = route, method, str(status)
        self.counts = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0
        self._lock = threading.Lock()
        outcome = ACQUIRE_OUTCOMES.get(status, "error")
        self._acquire = _acquire.labels(outcome) if (route, method) == ACQUIRE else None

    def add(self, seconds: float) -> None:
        with self._lock:
            self.counts[bisect_left(BOUNDS, seconds)] += 1
            self.seconds += seconds
        if self._acquire is not None:
            self._acquire.observe(seconds)


class Requests(Collector):
    """The tallies of this process, as metrics."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str, int], Tally] = {}
        self._lock = threading.Lock()

    def tally(self, route: str, method: str, status: int) -> Tally:
        method = method if method in METHODS else OTHER
        with self._lock:
            return self.tallies.setdefault((route, method, status), Tally(route, method, status))

    def collect(self) -> Iterator[Metric]:
        total = CounterMetricFamily(
            "loom_http_requests", "Requests that were answered.", labels=["route", "method", "status"]
        )
        times = HistogramMetricFamily(
            "loom_http_request_seconds",
            "From the arrival of a request to its answer, with the time for which it asked to wait.",
            labels=["route"],
        )
        by_route: dict[str, tuple[list[int], float]] = {}
        for tally in list(self.tallies.values()):
            counts, seconds = list(tally.counts), tally.seconds
            total.add_metric([tally.route, tally.method, tally.status], sum(counts))
            others, more = by_route.get(tally.route, ([0] * len(counts), 0.0))
            by_route[tally.route] = [a + b for a, b in zip(counts, others, strict=True)], seconds + more
        names = [*map(str, BOUNDS), "+Inf"]
        for route, (counts, seconds) in by_route.items():
            times.add_metric([route], list(zip(names, accumulate(counts), strict=True)), seconds)
        yield from (total, times)


def traffic() -> dict[str, Traffic]:
    """What this process has answered on /api/v1 since its start, by kind."""
    found: dict[str, Traffic] = {}
    for (route, method, status), tally in list(REQUESTS.tallies.items()):
        if route.startswith("/api/v1/") and route != "/api/v1/health":
            kind = "acquire" if (route, method) == ACQUIRE else "events" if route == EVENTS else "request"
            counts = list(tally.counts)
            more = Traffic(sum(counts), sum(counts) if status >= 500 else 0, tally.seconds, counts)
            found[kind] = found[kind] + more if kind in found else more
    return found


REQUESTS = Requests()
REGISTRY.register(REQUESTS)
_known: dict[tuple[str | None, str, int], Tally] = {}  # by what a request has at hand


def _current() -> Request:
    return request._get_current_object()  # type: ignore[attr-defined]  # each use of `request` takes 0.3 us


def start() -> None:
    environ = _current().environ
    if STARTED not in environ:
        environ[STARTED] = environ.get(RECEIVED) or time.monotonic()


def count(status: int) -> None:
    """Counts the request that is answered with this status."""
    current = _current()
    rule, environ = current.url_rule, current.environ
    key = (None if rule is None else rule.rule, environ["REQUEST_METHOD"], status)
    tally = _known.get(key)
    if tally is None:
        tally = REQUESTS.tally(_template(key[0]), *key[1:])
        if key[1] in METHODS:  # else clients could make the dictionary grow
            _known[key] = tally
    tally.add(time.monotonic() - environ[STARTED])


def count_refusal(status: int) -> None:
    """Counts a request that the server refused before the application saw it."""
    REQUESTS.tally(UNMATCHED, OTHER, status).add(0.0)


def _template(rule: str | None) -> str:
    """The path of a route as the contract writes it: <name:_> becomes {name}, <key> becomes {key}."""
    return UNMATCHED if rule is None else re.sub("<(?:([^<>]*):)?([^<>]*)>", lambda m: f"{{{m[1] or m[2]}}}", rule)
