"""What /metrics counts in this process. Every label has a fixed set of values, whatever clients send."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

disable_created_metrics()  # they would double the number of counters; a restart shows in process_start_time_seconds

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

NOTICE = "loom: "  # begins the notice by which a function of loom/sql/ reports an event; the name of the event follows
EVENTS = (
    "instance_died",
    "instance_replaced",
    "database_lost",
    "database_regained",
    "lock_taken_over",
    "lock_expired",
    "bead_given_back",
    "heartbeat_late",
)
CLAIM_OUTCOMES = (
    *("claimed", "same", "nothing", "renewed", "completed", "failed", "released", "repeated"),
    *("agent-busy", "bead-blocked", "bead-claimed", "bead-closed", "claim-lost", "lock-held", "lock-lost"),
    *("invalid", "not-found", "open-children"),
)
OTHER = "other"

_failovers = Counter("loom_failover_events", "Failures, and what was done about them.", ["event"], registry=REGISTRY)
_failover = {event: _failovers.labels(event) for event in EVENTS}
_claims = Counter("loom_claims", "Calls that make, renew or end a claim.", ["outcome"], registry=REGISTRY)
_claim = {outcome: _claims.labels(outcome) for outcome in (*CLAIM_OUTCOMES, OTHER)}
connection_wait = Histogram(
    "loom_db_connection_wait_seconds",
    "How long requests waited for a connection, of those that found no idle one.",
    buckets=(0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5),
    registry=REGISTRY,
)


def count_failover(event: str) -> None:
    _failover[event].inc()


def count_claim(outcome: str) -> None:
    _claim.get(outcome, _claim[OTHER]).inc()


class Notices:
    """Stands where psycopg2 collects the notices of a connection, and counts those that report an event."""

    @staticmethod
    def append(notice: str) -> None:
        event = _failover.get(notice.partition(NOTICE)[2].rstrip())
        if event is not None:
            event.inc()
