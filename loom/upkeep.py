"""What one elected instance cleans: expired locks, lapsed claims, what the dead have left, and what has become old.

Elected through our own lock. Batches are small, and the clean-up of one kind never holds up another.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from datetime import timedelta

from loom import db, errors, instances, locks
from loom.config import Config
from loom.state import claims, events
from loom.state.writer import Writer

log = logging.getLogger("loom.upkeep")

PERIOD = 10.0  # seconds between two rounds, jittered by a fifth
LOCK = "loom:upkeep"
LEASE = 30  # seconds for which an elected instance holds the lock; it renews it while it lives
BATCH = 1000  # rows a statement


class Upkeep:
    """The thread that stands for election, and cleans while elected."""

    def __init__(self, config: Config, instance: instances.Instance) -> None:
        self._own, self._instance, self._database = config, instance, instance.database
        self._line = self._database.dedicated("upkeep")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the election, the lock included. Returns once it has, or after 2 s."""
        self._over.set()
        self._thread.join(2)

    def _run(self) -> None:
        while not self._over.wait(PERIOD * random.uniform(0.8, 1.2)):
            if self._database.away is not None or self._instance.draining:
                continue
            identity = self._instance.instance_id
            owner = f"instance:{identity}"
            election = locks.hold(LOCK, LEASE, owner=owner, instance_id=identity, database=self._database)
            try:
                with contextlib.suppress(errors.LockHeld, errors.LockLost, errors.Unavailable), election:
                    self._serve(election, identity)
            except Exception:
                log.exception("upkeep-failed")

    def _serve(self, election: locks.Hold, identity: str) -> None:
        """Cleans for as long as we are elected."""
        while not election.lost and not self._instance.draining and self._instance.instance_id == identity:
            self.clean()
            if self._over.wait(PERIOD * random.uniform(0.8, 1.2)):
                return

    def clean(self) -> None:
        """One round. A failure of one part is logged and leaves the others alone."""
        for part in (
            self._locks,
            self._waiters,
            self._instances,
            self._agents,
            self._claims,
            self._grants_history,
            self._claims_history,
            self._answers,
            self._events,
        ):
            try:
                with self._line.connection() as conn:
                    part(conn)
            except errors.Busy:
                continue
            except errors.Unavailable:
                return
            except Exception as exc:
                log.exception("upkeep-failed", extra={"fields": {"part": part.__name__, "reason": str(exc)}})

    def _locks(self, conn: db.Connection) -> None:
        """The trigger writes their history."""
        self._remove(conn, "distributed_locks", "lock_name", "expires_at < clock_timestamp()")

    def _waiters(self, conn: db.Connection) -> None:
        self._remove(conn, "lock_waiters", "lock_name, owner", "asked_at < clock_timestamp() - INTERVAL '1 minute'")

    def _instances(self, conn: db.Connection) -> None:
        """Marks who has been silent for a minute, removes who has been for five: never itself, nor after an outage."""
        mine = {"id": self._instance.instance_id}
        db.run(conn, "SELECT note_outage()")  # we may be the first to get through after one
        died = db.all(
            conn,
            """
            UPDATE instances SET status = 'dead'
             WHERE instance_status(status, last_heartbeat) = 'dead' AND status <> 'dead' AND instance_id <> %(id)s
            RETURNING instance_id, hostname, metadata
            """,
            **mine,
        )
        for row in died:
            log.warning("instance-dead", extra={"fields": row})
        db.run(
            conn,
            "DELETE FROM instances WHERE heartbeats_count() AND instance_id <> %(id)s"
            " AND last_heartbeat < clock_timestamp() - INTERVAL '5 minutes'",
            **mine,
        )

    def _agents(self, conn: db.Connection) -> None:
        for agent in claims.end_dead_agents(conn, self._writer):
            log.warning("agent-dead", extra={"fields": {"agent_id": agent}})

    def _claims(self, conn: db.Connection) -> None:
        for _ in range(100):
            lapsed = claims.lapse(conn, self._writer, BATCH // 10)  # their agents wait meanwhile
            for claim in lapsed:
                log.warning("claim-lapsed", extra={"fields": claim})
            if len(lapsed) < BATCH // 10 or self._over.is_set():
                return

    @property
    def _config(self) -> Config:
        """The one in force."""
        return self._instance.shared.over(self._own)

    @property
    def _writer(self) -> Writer:
        return Writer(self._config, "loom", self._instance.instance_id)

    def _grants_history(self, conn: db.Connection) -> None:
        self._history(conn, "grants")

    def _claims_history(self, conn: db.Connection) -> None:
        self._history(conn, "claims")

    def _history(self, conn: db.Connection, table: str) -> None:
        """From the oldest token on, which is nearly the oldest end: no index of its own, nor a look at all."""
        self._in_batches(
            conn,
            f"""
            WITH old AS MATERIALIZED (
                SELECT fencing_token
                  FROM (SELECT fencing_token, ended_at FROM {table} ORDER BY fencing_token LIMIT 10 * %(batch)s) AS g
                 WHERE ended_at < clock_timestamp() - %(keep)s ORDER BY fencing_token LIMIT %(batch)s)
            DELETE FROM {table} USING old WHERE {table}.fencing_token = old.fencing_token
            RETURNING 1 AS gone
            """,
            keep=timedelta(days=self._config.locks.history_days),
        )

    def _answers(self, conn: db.Connection) -> None:
        which = "created_at < clock_timestamp() - INTERVAL '24 hours' ORDER BY created_at"
        self._remove(conn, "idempotency_keys", "scope", which)

    def _events(self, conn: db.Connection) -> None:
        """Numbers what nobody has read; removes from the oldest number on, and none behind one that is kept."""
        for _ in range(100):
            if not events.number(conn) or self._over.is_set():
                break
        self._in_batches(
            conn,
            """
            WITH oldest AS MATERIALIZED (
                SELECT place, bool_and(timestamp < clock_timestamp() - %(keep)s) OVER (ORDER BY id) AS old
                  FROM (SELECT * FROM feed ORDER BY id LIMIT %(batch)s) AS f)
            DELETE FROM events USING oldest WHERE events.place = oldest.place AND oldest.old
            RETURNING 1 AS gone
            """,
            keep=timedelta(days=self._config.events.history_days),
        )

    def _remove(self, conn: db.Connection, table: str, key: str, which: str) -> None:
        """Passes over rows that somebody is at."""
        self._in_batches(
            conn,
            f"""
            WITH old AS MATERIALIZED (
                SELECT {key} FROM {table} WHERE {which} LIMIT %(batch)s FOR UPDATE SKIP LOCKED)
            DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM old)
            RETURNING 1 AS gone
            """,
        )

    def _in_batches(self, conn: db.Connection, sql: str, **params: object) -> None:
        """At most a hundred batches a round, so that the other parts get their turn."""
        for _ in range(100):
            if len(db.all(conn, sql, batch=BATCH, **params)) < BATCH or self._over.is_set():
                return
