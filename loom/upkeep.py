"""Clean-up by one elected instance: expired locks, lapsed claims, dead instances and agents, old history and logs.

The election is a Loom lock. Batches are small. What is locked is skipped, row by row, and reported when it stays so. A
failure of one row stops no other row, and a failure of one part stops no other part.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

from loom import db, errors, instances, locks
from loom.config import Config
from loom.state import claims, events, logs
from loom.state.writer import Writer

log = logging.getLogger("loom.upkeep")

PERIOD = 10.0  # seconds between two rounds, jittered by a fifth
LOCK = "loom:upkeep"
TTL = 30  # seconds of the lock of the election; the elected instance renews it
BATCH = 1000  # rows per statement
LOCK_SECONDS = 0.1  # for which a statement waits for a lock, of a table or in a trigger: rows are skipped
LATE = timedelta(minutes=1)  # after which a row that should be gone is reported
REPORT_SECONDS = 300  # between two reports about the same part
PART_SECONDS = 5  # for what a part does row by row, in one round


class Part(NamedTuple):
    """Rows that are deleted, or changed by `action`, when `due` is true; {now} stands for the time.

    `key` names a row in the log. A row that `returning` describes is logged as the event `log_as`.
    """

    name: str
    table: str
    key: str
    due: str
    order: str = ""
    action: str = "DELETE FROM {table}"
    returning: str = "1 AS gone"
    log_as: str = ""


def _history(table: str) -> Part:
    """Old rows in the order of their tokens, which is nearly the order of their ends.

    So it needs no index on `ended_at`, and reads only the oldest rows.
    """
    oldest = f"SELECT fencing_token FROM {table} ORDER BY fencing_token LIMIT {10 * BATCH}"
    due = f"fencing_token <= (SELECT max(fencing_token) FROM ({oldest}) AS t) AND ended_at < {{now}} - %(keep)s"
    return Part(f"history of {table}", table, "fencing_token", due, "ORDER BY fencing_token")


PARTS = [
    Part("locks", "distributed_locks", "lock_name", "expires_at < {now}"),  # a trigger writes their history
    Part("waiters", "lock_waiters", "lock_name || ' ' || owner", "asked_at < {now} - INTERVAL '1 minute'"),
    # Never this instance itself, and none in the first minute after an outage of the database.
    Part(
        "instances",
        "instances",
        "instance_id",
        "instance_id <> %(me)s AND status <> 'dead' AND last_heartbeat < {now} - INTERVAL '1 minute'"
        " AND heartbeats_count()",
        action="UPDATE {table} SET status = 'dead'",
        returning="instance_id, hostname, metadata",
        log_as="instance-dead",
    ),
    Part(
        "dead instances",
        "instances",
        "instance_id",
        "instance_id <> %(me)s AND last_heartbeat < {now} - INTERVAL '5 minutes' AND heartbeats_count()",
    ),
    Part("traffic", "traffic", "minute || ' ' || instance_id", "minute < {now} - INTERVAL '1 day'"),
    _history("grants"),
    _history("claims"),
    Part(
        "idempotency keys",
        "idempotency_keys",
        "scope",
        "created_at < {now} - INTERVAL '24 hours'",
        "ORDER BY created_at",
    ),
]
SILENT_AGENTS = """
    SELECT id AS key FROM agents
     WHERE status <> 'dead' AND heartbeats_count()
       AND heartbeat_at < {now} - make_interval(secs => %(dead_after)s)"""
LATE_CLAIMS = """
    SELECT id AS key FROM beads WHERE status = 'in_progress' AND wakes_at(not_before, lease_expires_at) < {now}"""
OLD_EVENTS = "SELECT id AS key FROM (SELECT * FROM feed ORDER BY id LIMIT 1) AS f WHERE timestamp < {now} - %(keep)s"

T = TypeVar("T")


class Upkeep:
    """A thread that takes part in the election, and cleans while it is elected."""

    def __init__(self, config: Config, instance: instances.Instance) -> None:
        self._start_config, self._instance, self._database = config, instance, instance.database
        self._connection = self._database.dedicated("upkeep")
        self._reported: dict[str, float] = {}
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
        """One round of all parts, without a part if the database becomes unreachable."""
        with contextlib.suppress(errors.Unavailable):
            self._attempt("outage", lambda conn: db.run(conn, "SELECT note_outage()"))  # before heartbeats are compared
            for part in PARTS:
                self._clean_part(part)
            self._agents()
            self._claims()
            self._events()
            self._request_logs()

    def _clean_part(self, part: Part) -> None:
        params = {"me": self._instance.instance_id, "keep": timedelta(days=self._config.locks.history_days)}
        due = f"FROM {part.table} WHERE {part.due}"
        problems: dict[str, str] = {}

        def remove(conn: db.Connection, only: str = "", **row: str) -> list[db.Row]:
            sql = f"""
                WITH gone AS MATERIALIZED (
                    SELECT ctid {due} {only} {part.order} LIMIT {BATCH} FOR UPDATE SKIP LOCKED)
                {part.action} WHERE ctid = ANY (ARRAY(SELECT ctid FROM gone)) RETURNING {part.returning}"""
            rows = db.rows(conn, sql.format(now="clock_timestamp()", table=part.table), **params, **row)
            for fields in rows if part.log_as else ():
                log.warning(part.log_as, extra={"fields": fields})
            return rows

        def find(conn: db.Connection) -> list[db.Row]:
            sql = f"SELECT ctid::text AS row, ({part.key})::text AS key {due} {part.order} LIMIT {BATCH}"
            return db.rows(conn, sql.format(now="clock_timestamp()"), **params)

        for _ in range(100):
            removed = self._attempt(part.name, remove, {})
            if removed is None:  # one of them fails, or waits too long for another row
                for row in self._in_random_order(self._attempt(part.name, find)):
                    one = partial(remove, only="AND ctid = %(row)s::tid", row=row["row"])
                    self._attempt(part.name, one, problems, row["key"])
            if removed is None or len(removed) < BATCH or self._stopping.is_set():
                break
        else:
            return
        self._report_late(part.name, f"SELECT ({part.key})::text AS key {due}", problems, **params)

    def _agents(self) -> None:
        params = {"dead_after": self._config.agents.dead_after}
        problems: dict[str, str] = {}
        sql = SILENT_AGENTS.format(now="clock_timestamp()")
        for row in self._in_random_order(self._attempt("agents", lambda conn: db.rows(conn, sql, **params))):
            agent = row["key"]
            end = partial(claims.end_dead_agent, writer=self._writer, agent=agent)
            result = self._attempt("agents", end, problems, agent)
            if result == "dead":
                log.warning("agent-dead", extra={"fields": {"agent_id": agent}})
            elif result:
                problems[agent] = result
        self._report_late("agents", SILENT_AGENTS, problems, **params)

    def _claims(self) -> None:
        problems: dict[str, str] = {}
        for _ in range(100):
            # Small batches: the agents of these claims wait.
            ended = self._attempt("claims", partial(claims.lapse, writer=self._writer, most=BATCH // 10)) or []
            reopened = 0
            for claim in ended:
                problem = claim.pop("problem")
                if problem is None:
                    reopened += 1
                    log.warning("claim-lapsed", extra={"fields": claim})
                else:
                    problems[claim["bead_id"]] = problem
            if reopened < BATCH // 10 or self._stopping.is_set():
                break
        self._report_late("claims", LATE_CLAIMS, problems)
        self._in_batches("delays", partial(claims.end_delays, most=BATCH))
        self._in_batches("deferred", partial(claims.open_deferred, writer=self._writer, most=BATCH))

    def _events(self) -> None:
        """Numbers events that nobody has read, and removes old ones: only from the start of the feed, without gaps."""
        keep = timedelta(days=self._config.events.history_days)
        sql = f"""
            WITH oldest AS MATERIALIZED (
                SELECT place, bool_and(timestamp < clock_timestamp() - %(keep)s) OVER (ORDER BY id) AS old
                  FROM (SELECT * FROM feed ORDER BY id LIMIT {BATCH}) AS f)
            DELETE FROM events USING oldest WHERE events.place = oldest.place AND oldest.old
            RETURNING 1 AS gone"""
        self._in_batches("events", lambda conn: BATCH if events.number(conn) else 0)
        if self._in_batches("events", lambda conn: len(db.rows(conn, sql, keep=keep))):
            self._report_late("events", OLD_EVENTS, {}, keep=keep)

    def _request_logs(self) -> None:
        """Makes the partitions of the next days, and removes old ones: a long read of them may delay that."""
        self._attempt("request logs", logs.open_days)
        problems: dict[str, str] = {}
        trim = partial(logs.trim, settings=self._config.logging)
        for _ in range(100):
            removed = self._attempt("request logs", trim, problems, "oldest day")
            if removed is None:
                break
            log.info("request-logs-removed", extra={"fields": {"partition": removed}})
        if problems and self._may_report("request logs"):
            log.warning("upkeep-skipped", extra={"fields": {"part": "request logs", "rows": problems}})

    def _in_batches(self, part: str, work: Callable[[db.Connection], int]) -> bool:
        """Calls `work` at most a hundred times per round; whether it has come to an end: it did less than a batch."""
        return any((self._attempt(part, work) or 0) < BATCH or self._stopping.is_set() for _ in range(100))

    def _attempt(
        self,
        part: str,
        work: Callable[[db.Connection], T],
        problems: dict[str, str] | None = None,
        key: str = "",
    ) -> T | None:
        """The result of a part's statement, or None if it fails or has to wait for a lock. Raises Unavailable."""
        try:
            with self._connection.use(lock_seconds=LOCK_SECONDS) as conn:
                return work(conn)
        except errors.Busy as exc:
            if problems is not None:
                problems[key] = str(exc)
        except errors.Unavailable:
            raise
        except Exception as exc:
            if problems is not None:
                problems[key] = str(exc)
            elif self._may_report(f"failure of {part}"):
                log.exception("upkeep-failed", extra={"fields": {"part": part, "reason": str(exc)}})
        return None

    def _in_random_order(self, rows: list[db.Row] | None) -> Iterator[db.Row]:
        """For a few seconds: so that neither rows that fail nor a part hold up the others."""
        ends = time.monotonic() + PART_SECONDS
        for row in random.sample(rows or [], len(rows or [])):
            if time.monotonic() > ends or self._stopping.is_set():
                return
            yield row

    def _report_late(self, part: str, sql: str, problems: dict[str, str], **params: Any) -> None:
        """Logs the rows that should have been gone for a minute: somebody keeps them locked, or they fail."""
        sql = f"{sql} LIMIT 10".format(now="(clock_timestamp() - %(late)s)")
        late = self._attempt(part, lambda conn: db.rows(conn, sql, late=LATE, **params)) or []
        if late and self._may_report(part):
            rows = {row["key"]: problems.get(row["key"], "its row is locked") for row in late}
            log.warning("upkeep-skipped", extra={"fields": {"part": part, "rows": rows}})

    def _may_report(self, what: str) -> bool:
        now = time.monotonic()
        if now - self._reported.get(what, float("-inf")) < REPORT_SECONDS:
            return False
        self._reported[what] = now
        return True

    @property
    def _config(self) -> Config:
        """The settings in force."""
        return self._instance.shared.over(self._start_config)

    @property
    def _writer(self) -> Writer:
        return Writer(self._config, "loom", self._instance.instance_id)
