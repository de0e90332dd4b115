"""What the instances have answered, by minute, for charts: each adds its own every few seconds to one small table."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loom import db, errors, instances

log = logging.getLogger("loom.traffic")

PERIOD = 5.0  # seconds between two writes, jittered by a fifth
MINUTES = 60  # that the charts show
SHARE_MINUTES = 5  # over which the share of each instance is counted


@dataclass(frozen=True)
class Traffic:
    """So many requests, errors (5xx) among them, the seconds they took, and their counts by duration."""

    requests: int
    errors: int
    seconds: float
    counts: Sequence[int]

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.requests + other.requests,
            self.errors + other.errors,
            self.seconds + other.seconds,
            [a + b for a, b in zip(self.counts, other.counts, strict=True)],
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.requests - other.requests,
            self.errors - other.errors,
            self.seconds - other.seconds,
            [a - b for a, b in zip(self.counts, other.counts, strict=True)],
        )


class Recorder:
    """A thread that writes what this instance has answered since it wrote last. What it cannot write now, it adds to
    the next minute."""

    def __init__(self, measure: Callable[[], Mapping[str, Traffic]]) -> None:
        """`measure`: the traffic since the start of the process, by kind."""
        self._measure = measure
        self._written: dict[str, Traffic] = {}

    def start(self) -> None:
        threading.Thread(target=self._run, name="traffic", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(PERIOD * random.uniform(0.8, 1.2))
            try:
                self.record()
            except errors.Error:  # the database is away or busy: the next time
                pass
            except Exception:
                log.exception("traffic-not-recorded")

    def record(self) -> None:
        """Writes what is new, from a connection of the pool: it takes a millisecond. Raises as db.connection()."""
        me, now = instances.own_id(), dict(self._measure())
        new = {kind: now[kind] - self._written[kind] if kind in self._written else now[kind] for kind in now}
        new = {kind: traffic for kind, traffic in new.items() if traffic.requests}
        if me is None or not new:
            return
        db.default().start_request()
        with db.transaction() as conn:
            _add(conn, me, new)
        self._written = now


def _add(conn: db.Connection, instance_id: str, new: Mapping[str, Traffic]) -> None:
    for kind, traffic in sorted(new.items()):
        db.run(
            conn,
            """
            INSERT INTO traffic AS t
                VALUES (date_trunc('minute', clock_timestamp()), %(id)s, %(kind)s,
                        %(requests)s, %(errors)s, %(seconds)s, %(counts)s)
                ON CONFLICT (minute, instance_id, kind) DO UPDATE
                   SET requests = t.requests + excluded.requests, errors = t.errors + excluded.errors,
                       seconds = t.seconds + excluded.seconds,
                       counts = ARRAY(SELECT a + b FROM unnest(t.counts, excluded.counts) AS u (a, b))
            """,
            id=instance_id,
            kind=kind,
            requests=traffic.requests,
            errors=traffic.errors,
            seconds=traffic.seconds,
            counts=list(traffic.counts),
        )


def last_hour(conn: db.Connection) -> dict[str, list[Traffic | None]]:
    """By kind, the traffic of the cluster in each of the last minutes, oldest first; None in one without any.

    The last minute is the current one, which is not over.
    """
    rows = db.rows(
        conn,
        """
        SELECT extract(epoch FROM date_trunc('minute', clock_timestamp()) - minute)::integer / 60 AS ago, kind,
               requests, errors, seconds, counts
          FROM traffic WHERE minute > clock_timestamp() - make_interval(mins => %(minutes)s)
        """,
        minutes=MINUTES,
    )
    found: dict[str, list[Traffic | None]] = {}
    for row in rows:
        minutes = found.setdefault(row["kind"], [None] * MINUTES)
        more = Traffic(row["requests"], row["errors"], row["seconds"], row["counts"])
        place = MINUTES - 1 - row["ago"]
        if 0 <= place < MINUTES:
            before = minutes[place]
            minutes[place] = more if before is None else before + more
    return found


def shares(conn: db.Connection) -> dict[str, float]:
    """By instance, its part of the requests of the last minutes, from 0 to 1."""
    rows = db.rows(
        conn,
        """
        SELECT instance_id::text AS id, sum(requests)::bigint AS requests FROM traffic
         WHERE minute > clock_timestamp() - make_interval(mins => %(minutes)s) GROUP BY instance_id
        """,
        minutes=SHARE_MINUTES,
    )
    every = sum(row["requests"] for row in rows)
    return {row["id"]: row["requests"] / every for row in rows}
