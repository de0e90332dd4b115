"""Clean-up by one elected instance: expired locks, lapsed claims, dead instances and agents, old history.

The election is a Loom lock. Batches are small, and a failure in one task never stops the others.
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
TTL = 30  # seconds of the lock of the election; the elected instance renews it
BATCH = 1000  # rows per statement


class Upkeep:
    """A thread that takes part in the election, and cleans while it is elected."""

    def __init__(self, config: Config, instance: instances.Instance) -> None:
        self._start_config, self._instance, self._database = config, instance, instance.database
        self._connection = self._database.dedicated("upkeep")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread, which releases the lock of the election. Waits for it at most 2 s."""
        self._stopping.set()
        self._thread.join(2)

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD * random.uniform(0.8, 1.2)):
            if self._database.away is not None or self._instance.draining:
                continue
            identity = self._instance.instance_id
            owner = f"instance:{identity}"
            election = locks.hold(LOCK, TTL, owner=owner, instance_id=identity, database=self._database)
            try:
                with contextlib.suppress(errors.LockHeld, errors.LockLost, errors.Unavailable), election:
                    self._clean_while_elected(election, identity)
            except Exception:
                log.exception("upkeep-failed")

    def _clean_while_elected(self, election: locks.Hold, identity: str) -> None:
        """Cleans while this instance is elected."""
        while not election.lost and not self._instance.draining and self._instance.instance_id == identity:
            self.clean()
            if self._stopping.wait(PERIOD * random.uniform(0.8, 1.2)):
                return

    def clean(self) -> None:
        """One round of all tasks. A failure of one task is logged, and the others still run."""
        for task in (
            self._locks,
            self._waiters,
            self._instances,
            self._agents,
            self._claims,
            self._deferred,
            self._grants_history,
            self._claims_history,
            self._answers,
            self._events,
        ):
            try:
                with self._connection.use() as conn:
                    task(conn)
            except errors.Busy:
                continue
            except errors.Unavailable:
                return
            except Exception as exc:
                log.exception("upkeep-failed", extra={"fields": {"part": task.__name__, "reason": str(exc)}})

    def _locks(self, conn: db.Connection) -> None:
        """Removes expired locks; a trigger writes their history."""
        self._remove(conn, "distributed_locks", "lock_name", "expires_at < clock_timestamp()")

    def _waiters(self, conn: db.Connection) -> None:
        self._remove(conn, "lock_waiters", "lock_name, owner", "asked_at < clock_timestamp() - INTERVAL '1 minute'")

    def _instances(self, conn: db.Connection) -> None:
        """Marks instances as dead after a minute without a heartbeat, removes them after five.

        Never this instance itself, and none in the first minute after an outage of the database.
        """
        mine = {"id": self._instance.instance_id}
        db.run(conn, "SELECT note_outage()")  # this may be the first statement after one
        died = db.rows(
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
            lapsed = claims.lapse(conn, self._writer, BATCH // 10)  # small batches: the agents of these claims wait
            for claim in lapsed:
                log.warning("claim-lapsed", extra={"fields": claim})
            if len(lapsed) < BATCH // 10 or self._stopping.is_set():
                return

    def _deferred(self, conn: db.Connection) -> None:
        """Opens the deferred beads whose time has come, also when nobody asks for work."""
        while claims.open_deferred(conn, self._writer, BATCH // 10) and not self._stopping.is_set():
            continue

    @property
    def _config(self) -> Config:
        """The settings in force."""
        return self._instance.shared.over(self._start_config)

    @property
    def _writer(self) -> Writer:
        return Writer(self._config, "loom", self._instance.instance_id)

    def _grants_history(self, conn: db.Connection) -> None:
        self._history(conn, "grants")

    def _claims_history(self, conn: db.Connection) -> None:
        self._history(conn, "claims")

    def _history(self, conn: db.Connection, table: str) -> None:
        """Removes old rows in the order of their tokens, which is nearly the order of their ends.

        So it needs no index on `ended_at`, and reads only the oldest rows.
        """
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
        condition = "created_at < clock_timestamp() - INTERVAL '24 hours' ORDER BY created_at"
        self._remove(conn, "idempotency_keys", "scope", condition)

    def _events(self, conn: db.Connection) -> None:
        """Numbers events that nobody has read, and removes old ones: only from the start of the feed, without gaps."""
        for _ in range(100):
            if not events.number(conn) or self._stopping.is_set():
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

    def _remove(self, conn: db.Connection, table: str, key: str, condition: str) -> None:
        """Deletes rows in batches, and skips locked rows."""
        self._in_batches(
            conn,
            f"""
            WITH old AS MATERIALIZED (
                SELECT {key} FROM {table} WHERE {condition} LIMIT %(batch)s FOR UPDATE SKIP LOCKED)
            DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM old)
            RETURNING 1 AS gone
            """,
        )

    def _in_batches(self, conn: db.Connection, sql: str, **params: object) -> None:
        """Runs a statement for at most a hundred batches per round, so that the other tasks run too."""
        for _ in range(100):
            if len(db.rows(conn, sql, batch=BATCH, **params)) < BATCH or self._stopping.is_set():
                return
