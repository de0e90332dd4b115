"""What an operator wants to see first: the health of the cluster in one sentence, instances, locks, beads, leases."""

from __future__ import annotations

from dataclasses import dataclass, field

from loom import db, instances
from loom.totals import EVENT_LAG, MOST, count, totals

LOCKS = LEASES = 20  # rows of each that are shown: the most contended locks, the leases that end first
EVENTS_LATE = 60.0  # seconds; `LoomEventsLate` of deploy/monitoring/loom.rules.yml fires then, too
STATUSES = ("open", "in_progress", "blocked", "deferred", "closed")


@dataclass(frozen=True)
class Health:
    """level: well, degraded (some part is not), or down (nothing is served)."""

    level: str
    summary: str
    instances: list[instances.InstanceRow]


@dataclass(frozen=True)
class Overview:
    """The cluster at one moment. `locks` and `leases` are cut; a number at MOST means so many or more.

    `beads`: by status, and `ready`, which are those of the open ones that can be claimed now.
    """

    healthy: bool
    summary: str
    instances: list[instances.InstanceRow]
    locks_held: int
    locks: list[db.Row]
    beads: dict[str, int]
    leases: list[db.Row]
    event_lag_seconds: float = field(default=0.0)


def read(conn: db.Connection) -> Overview:
    """The cluster now."""
    registry, total = instances.registry(conn), totals(conn)
    total |= db.row(conn, f"SELECT {_numbers('deferred', 'closed')}")
    locks = db.rows(
        conn,
        f"""
        WITH waiters AS (
            SELECT lock_name, count(*) AS waiting FROM lock_waiters
             WHERE keeps_place(asked_at, clock_timestamp()) GROUP BY lock_name)
        SELECT lock_name, owner, fencing_token, acquired_at, expires_at,
               extract(epoch FROM expires_at - clock_timestamp())::float AS seconds_left,
               COALESCE(waiting, 0) AS waiting
          FROM distributed_locks LEFT JOIN waiters USING (lock_name)
         WHERE expires_at > clock_timestamp() ORDER BY waiting DESC, acquired_at LIMIT {LOCKS}
        """,
    )
    leases = db.rows(
        conn,
        f"""
        SELECT id, assigned_to, lease_expires_at, attempts,
               extract(epoch FROM lease_expires_at - clock_timestamp())::float AS seconds_left
          FROM beads WHERE status = 'in_progress' AND wakes_at(not_before, lease_expires_at) IS NOT NULL
         ORDER BY wakes_at(not_before, lease_expires_at) LIMIT {LEASES}
        """,
    )
    health = _judged(registry, total["event_lag"])
    return Overview(
        healthy=health.level == "well",
        summary=health.summary,
        instances=registry,
        locks_held=total["locks_held"],
        locks=locks,
        beads={name: total[name] for name in (*STATUSES, "ready")},
        leases=leases,
        event_lag_seconds=total["event_lag"],
    )


def beads(conn: db.Connection) -> dict[str, int]:
    """The numbers of beads by status, and `ready`, as in the overview."""
    ready = count("beads WHERE is_ready(status, open_blockers, open_children, not_before)")
    return db.row(conn, f"SELECT {_numbers(*STATUSES)}, {ready} AS ready")


def _numbers(*statuses: str) -> str:
    return ", ".join(f"{count(f'beads WHERE status = {status!r}')} AS {status}" for status in statuses)


def health(conn: db.Connection) -> Health:
    """Whether all is well, without the totals."""
    return _judged(instances.registry(conn), db.value(conn, f"SELECT {EVENT_LAG}"))


def _judged(registry: list[instances.InstanceRow], event_lag: float) -> Health:
    problems = _problems(registry, event_lag)
    active = sum(row.active for row in registry)
    serving = f"{_number(active, 'instance')} {_are(active)} active"
    if not active:
        problems.insert(0, "nothing is served: no instance is active")
    elif problems:
        problems.insert(0, serving)
    sentence = "; ".join(problems) or f"all is well: {serving}"
    level = "down" if not active else "degraded" if problems else "well"
    return Health(level, f"{sentence[0].upper()}{sentence[1:]}.", registry)


def _problems(registry: list[instances.InstanceRow], event_lag: float) -> list[str]:
    found = [
        f"{row.hostname}:{row.metadata.get('port', '?')} is dead, silent for {row.heartbeat_age_seconds:.0f} s"
        for row in registry
        if row.status == "dead"
    ]
    draining = sum(row.status == "draining" for row in registry)
    if found and draining:
        found.append(f"{_number(draining, 'instance')} {_are(draining)} draining")
    if event_lag > EVENTS_LATE:
        found.append(f"events have been missing from the feed for {event_lag:.0f} s")
    return found


def shown(number: int) -> str:
    """A count that stops at MOST, as text."""
    return f"{number:,}" if number < MOST else f"{MOST:,} or more"


def span(seconds: float) -> str:
    """A time span as text, such as 12 s, 3 min, 5 h or 4 d."""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _number(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"
