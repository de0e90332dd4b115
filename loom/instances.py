"""The registry: each gunicorn worker is an instance, with a row, a heartbeat, and an orderly or a noticed end."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from loom import __version__, credentials, db, embedded, errors, metrics
from loom.config import Config
from loom.db import Time
from loom.db.connection import SLACK
from loom.log import set_level
from loom.state import config as shared_config
from loom.state import keys

log = logging.getLogger("loom.instances")

HEARTBEAT_PERIOD = 5.0  # seconds, jittered by a fifth; note_outage() in loom/sql/instances.sql allows three of them
RETRY_PERIOD = 1.0  # seconds, after a heartbeat that failed
SCHEMA_SECONDS = 3.0  # seconds to apply the schema while a start or a request waits for it
LATE = 3 * HEARTBEAT_PERIOD  # seconds without a heartbeat that are counted as an event
TRUST = 30.0  # seconds after a successful heartbeat for which we assume that we are still registered
BOOT_ERROR = 3  # the exit status that stops gunicorn; otherwise it forks for ever (its WORKER_BOOT_ERROR)

# A clock that keeps counting while the machine sleeps: a worker that was suspended must notice before it serves.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


@dataclass(frozen=True)
class InstanceRow:
    """A row of the registry. status is 'active', 'draining' or 'dead'."""

    instance_id: str
    hostname: str
    started_at: Time
    last_heartbeat: Time
    status: str
    metadata: dict[str, Any]
    heartbeat_age_seconds: float

    @property
    def active(self) -> bool:
        """As ACTIVE below says it of a row."""
        return self.status == "active" and self.heartbeat_age_seconds < 60


class Instance:
    """This process in the registry."""

    def __init__(
        self,
        database: db.Database,
        metadata: dict[str, Any],
        instance_id: str | None = None,
        report_identity: Callable[[bytes], object] = lambda message: None,
        config: Config | None = None,
    ) -> None:
        """`report_identity` tells the parent process a later identity (16 bytes), or b"" after an orderly end."""
        self.instance_id = instance_id or str(uuid.uuid4())
        self.hostname = socket.gethostname()
        self.status = "active"
        self._order = "active"  # the status that the row has: an operator may write `draining` into it
        self.started = time.monotonic()
        self.missed = 0
        self._logged: set[str] = set()  # why heartbeats failed since the last good one
        self.shared = shared_config.Shared()
        self.keys = keys.Keys()
        self.database, self._metadata, self._report_identity = database, metadata, report_identity
        self._config = config or Config()
        self._connection = database.dedicated("heartbeat")
        self._registered = False
        self._last_good = float("-inf")
        self._beating = threading.Lock()
        self._wake = threading.Event()
        self._leaving = False

    @property
    def draining(self) -> bool:
        """Whether it is about to leave, or an operator has ordered it to drain."""
        return "draining" in (self.status, self._order)

    @property
    def fresh(self) -> bool:
        """Whether a heartbeat of the last 30 s succeeded: then nobody has declared us dead for a missed one."""
        return self.heartbeat_age <= TRUST

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the last heartbeat that succeeded, infinite before the first."""
        return time.clock_gettime(_CLOCK) - self._last_good

    def start(self) -> None:
        """Migrates, registers, and continues with heartbeats. Without a database it does so as soon as there is one.

        Raises SchemaError.
        """
        with contextlib.suppress(errors.Unavailable):
            self.beat(SCHEMA_SECONDS)
        threading.Thread(target=self._run_heartbeats, name="heartbeat", daemon=True).start()

    def beat(self, schema_timeout: float = 10.0, deadline: float | None = None) -> None:
        """Sends one heartbeat, as a new instance if ours was removed or is dead. Raises Unavailable, SchemaError.

        `deadline`: that of the request for which it is sent, on the monotonic clock.
        """

        def left(most: float) -> float:
            return most if deadline is None else max(0.01, min(most, deadline - time.monotonic()))

        sent = time.clock_gettime(_CLOCK)
        if not self._registered:
            db.migrate(
                lambda: self.database.dsn, timeout=left(2 * schema_timeout) / 2
            )  # to connect, and again for the rest
        with self._connection.use(left(self.database.timeout - SLACK)) as conn:
            if self._registered and not self._obey(
                self._call(conn, "heartbeat_instance(%(id)s, %(status)s)", status=self.status)
            ):
                log.warning("instance-removed", extra={"fields": {"instance_id": self.instance_id}})
                self.instance_id, self._registered = str(uuid.uuid4()), False
                self._report_identity(uuid.UUID(self.instance_id).bytes)
                metrics.count_failover("instance_replaced")
            if not self._registered:
                about = msgspec.json.encode(self._metadata).decode()
                self._call(conn, "register_instance(%(id)s, %(host)s, %(about)s)", host=self.hostname, about=about)
                self._registered = True
                log.info("instance-registered", extra={"fields": {"instance_id": self.instance_id, **self._metadata}})
                self._warn_of_settings(conn)
            used = self.keys.take_used()
            if used:
                db.run(conn, "SELECT note_key_uses(%(ids)s)", ids=used)
        if self._logged:
            log.warning("heartbeat-back", extra={"fields": {"missed": self.missed}})
            self._logged.clear()
        self.missed = 0
        if LATE < self.heartbeat_age < float("inf"):
            metrics.count_failover("heartbeat_late")
        self._last_good = sent

    def _obey(self, order: str | None) -> bool:
        """Takes the status that the row has, and whether there is one. A new identity has no order."""
        found, order = order is not None, order or "active"
        if self.status == "active" and order != self._order:
            self._order = order
            if order == "draining":
                log.warning("drain-ordered")
            else:
                log.warning("drain-revoked")
        return found

    def _call(self, conn: db.Connection, function: str, **params: Any) -> Any:
        """Calls a function of the registry, and reads shared settings and keys in the same round trip."""
        sent = keys.now()
        sql = f"SELECT {function} AS returned, {shared_config.COLUMN}, valid_keys(%(known_keys)s) AS keys"
        row = db.row(conn, sql, id=self.instance_id, known_keys=self.keys.state, **params, **shared_config.PARAMETERS)
        self.keys.learn(row["keys"], sent)
        if self.shared.learn(row["shared"]):
            set_level(self.shared.over(self._config).logging.level)
        return row["returned"]

    def confirm(self) -> None:
        """Finds out whether we are still registered; called before a request if we are not `fresh`.

        It has no more time than the request. Raises Unavailable.
        """
        deadline = self.database.request_deadline
        if self.database.away is not None or not self._beating.acquire(timeout=1):
            raise errors.Unavailable()
        try:
            if not self.fresh:
                self.beat(SCHEMA_SECONDS, deadline)
        finally:
            self._beating.release()

    def drain(self) -> None:
        """Marks the instance as draining; safe in a signal handler. The next heartbeat writes it to the registry."""
        if self.status == "draining":  # a second signal during the first: Event.set() would deadlock
            return
        self.status = "draining"
        self._wake.set()

    def leave(self) -> None:
        """Ends our own grants and removes our row, in bounded time. Without a database the row stays and ages."""
        self._leaving = True
        self._wake.set()
        with self._beating, contextlib.suppress(errors.Error):
            if self._registered and self.database.away is None:
                with self._connection.use() as conn:
                    db.run(conn, "SELECT leave_instance(%(id)s)", id=self.instance_id)
                self._report_identity(b"")
        self._connection.close()

    def _run_heartbeats(self) -> None:
        while not self._leaving:
            period = HEARTBEAT_PERIOD * random.uniform(0.8, 1.2) if not self.missed else RETRY_PERIOD
            self._wake.wait(period)
            self._wake.clear()
            with self._beating:
                if self._leaving:
                    return
                try:
                    self.beat()
                except errors.SchemaError as exc:
                    log.critical("schema-does-not-fit", extra={"fields": {"reason": str(exc)}})
                    os._exit(BOOT_ERROR)
                except Exception as exc:
                    self.missed += 1
                    self._log_failure(exc)

    def _log_failure(self, exc: Exception) -> None:
        """Logs each reason once until a heartbeat succeeds. An outage of the database is logged by its pool."""
        if isinstance(exc, errors.Unavailable) and (self.missed == 1 or self.database.away is not None):
            return
        if str(exc) not in self._logged:
            self._logged.add(str(exc))
            log.warning("heartbeat-failed", extra={"fields": {"missed": self.missed, "reason": str(exc)}})

    def _warn_of_settings(self, conn: db.Connection) -> None:
        """Warns of settings without which a crash can lose acknowledged writes, or a stranger's functions be called."""
        for row in db.rows(
            conn,
            "SELECT name, setting FROM pg_settings"
            " WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes') AND setting = 'off'",
        ):
            log.warning("database-may-lose-writes", extra={"fields": {"setting": row["name"], "value": "off"}})
        if db.value(conn, "SELECT has_schema_privilege('public', current_schema, 'CREATE')"):
            log.warning("schema-is-open", extra={"fields": {"remedy": "REVOKE CREATE ON SCHEMA public FROM PUBLIC"}})


ACTIVE = "status = 'active' AND last_heartbeat > clock_timestamp() - INTERVAL '60 seconds'"


def active(conn: db.Connection) -> int:
    """The number of active instances with a heartbeat in the last minute."""
    return db.value(conn, f"SELECT count(*) FROM instances WHERE {ACTIVE}")


_COLUMNS = """
    instance_id, hostname, started_at, last_heartbeat, metadata, instance_status(status, last_heartbeat) AS status,
    greatest(0, extract(epoch FROM clock_timestamp() - last_heartbeat))::float AS heartbeat_age_seconds"""


def some(conn: db.Connection, *, after: tuple[str, str] | None, limit: int) -> db.Page[InstanceRow]:
    """The registry, oldest instance first; only those after `after`: when it started, and its id."""
    started_at, instance_id = after or (None, None)
    sql = f"""
        SELECT row_to_json(i)::text FROM (
            SELECT {_COLUMNS} FROM instances
             WHERE %(started_at)s IS NULL OR (started_at, instance_id) > (%(started_at)s::timestamptz, %(id)s::uuid)
             ORDER BY started_at, instance_id LIMIT %(most_rows)s + 1) AS i
        """
    return db.Page(conn, InstanceRow, sql, limit, started_at=started_at, id=instance_id)


def registry(conn: db.Connection, most: int = 1000) -> list[InstanceRow]:
    """The first rows of the registry, oldest instance first."""
    sql = f"SELECT {_COLUMNS} FROM instances ORDER BY started_at, instance_id LIMIT %(most)s"
    return [InstanceRow(**row) for row in db.rows(conn, sql, most=most)]


def get(conn: db.Connection, instance_id: str) -> InstanceRow:
    """One instance. Raises NotFound."""
    sql = f"SELECT {_COLUMNS} FROM instances WHERE instance_id::text = %(id)s"
    found = db.one(conn, sql, id=instance_id.lower())
    if found is None:
        raise errors.NotFound("There is no such instance.")
    return InstanceRow(**found)


current: Instance | None = None
_no_keys = keys.Keys()  # of a process that is no instance


def known_keys() -> keys.Keys:
    """The API keys as this process knows them."""
    return _no_keys if current is None else current.keys


def own_id() -> str | None:
    """The instance id of this process, if it is an instance."""
    return None if current is None else current.instance_id


def start(config: Config, dsn: str, instance_id: str, report_identity: Callable[[bytes], object]) -> Instance:
    """Opens the process's database and makes the process an instance. Raises SchemaError."""
    global current
    settings = config.database
    database = db.Database(
        partial(credentials.dsn_of, settings, dsn),
        pool_min=min(settings.pool_min, config.server.threads),
        pool_max=min(settings.pool_max, config.server.threads),  # a thread uses one
        timeout=settings.timeout,
        application_name=f"loom:{config.server.http_port}",
        before_connect=partial(embedded.revive, Path(settings.folder)) if settings.type == "embedded" else None,
    )
    database.open()
    db.configure(database)
    metadata = {"pid": os.getpid(), "port": config.server.http_port, "version": __version__}
    current = Instance(database, metadata, instance_id, report_identity, config)
    current.start()
    return current


def drain() -> None:
    """Marks this process's instance, if any, as draining; safe in a signal handler."""
    if current is not None:
        current.drain()


def leave() -> None:
    """Removes this process's instance, if any, from the registry."""
    if current is not None:
        current.leave()


def order(conn: db.Connection, instance_id: str, status: str, reason: str) -> None:
    """Orders an instance to drain, or to be active again; it obeys with its next heartbeat. Raises NotFound."""
    found = db.one(
        conn,
        """
        UPDATE instances SET status = %(status)s, metadata = metadata || jsonb_build_object('order', %(reason)s::text)
         WHERE instance_id::text = %(id)s AND status <> 'dead' RETURNING 1
        """,
        id=instance_id.lower(),
        status=status,
        reason=reason,
    )
    if found is None:
        raise errors.NotFound("There is no such instance, or it is dead.")


def mark_dead(conn: db.Connection, instance_id: str) -> None:
    """Marks an instance as dead; its parent process does this when it has died."""
    db.run(conn, "UPDATE instances SET status = 'dead' WHERE instance_id = %(id)s AND status <> 'dead'", id=instance_id)
