"""What gunicorn.conf.py hands over to: the settings that a master reads for its workers, and their registration."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2

from loom import db, embedded, errors, instances
from loom import log as logs
from loom.config import Config, ConfigError, load
from loom.http import settings

log = logging.getLogger("loom.server")


class Read(NamedTuple):
    """What a master has read. `logging` is for logging.config.dictConfig; `dsn` is also an embedded server's."""

    settings: Config
    logging: dict[str, Any]
    dsn: str


_last: Read | None = None


def read() -> Read:
    """In a gunicorn master: read the settings, open the log and the embedded database.

    gunicorn calls it (through gunicorn.conf.py) at its start and at SIGHUP. A fault prevents the start; at SIGHUP it is
    logged, and what was read before stays in force.
    """
    global _last
    try:
        config = load()
        handlers = logs.setup(config.logging)
        database = config.database
        # The workers inherit the master's share of the folder.
        dsn = embedded.use(Path(database.folder)) if database.type == "embedded" else database.dsn
    except (ConfigError, embedded.ServerError) as exc:
        if _last is None:
            raise SystemExit(f"Error: {exc}") from None
        logs.setup(_last.settings.logging)
        log.error("settings-kept", extra={"fields": {"reason": str(exc)}})
    else:
        _last = Read(config, handlers, dsn)
        settings.inherit(config)
    return _last


# The master makes a worker's identity before the fork, so that it can mark the worker dead whatever happens. Both see
# it in shared memory. The worker puts a later identity there, and GONE when it has left in order.
GONE = bytes(16)


def before_fork(worker: Any, dsn: str) -> None:
    """pre_fork, in the master."""
    worker.dsn = dsn  # the worker's own: a later SIGHUP may lead its successors to another database
    worker.identity = mmap.mmap(-1, len(GONE))
    worker.identity[:] = uuid.uuid4().bytes


def after_fork(worker: Any, config: Config) -> instances.Instance:
    """post_fork, in the worker. A schema that does not fit ends the whole gunicorn, with one line."""

    def tell(identity: bytes) -> None:
        worker.identity[:] = identity or GONE

    try:
        return instances.start(config, worker.dsn, str(uuid.UUID(bytes=worker.identity[:])), tell)
    except errors.SchemaError as exc:
        log.critical("schema-does-not-fit", extra={"fields": {"reason": str(exc)}})
        sys.exit(instances.BOOT_ERROR)


def child_died(worker: Any) -> None:
    """child_exit, in the master: marks the worker dead unless it left in order.

    In a process of its own, since a slow database must not delay the replacement, which gunicorn forks after this.
    """
    identity = worker.identity[:]
    worker.identity.close()
    if identity == GONE:
        return
    master = os.getpid()
    if os.fork() == 0:
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(60)
            os.closerange(3, 4096)
            _mark_dead(worker.dsn, str(uuid.UUID(bytes=identity)), master)
        finally:
            os._exit(0)


def _mark_dead(dsn: str, identity: str, master: int) -> None:
    while True:
        try:
            with contextlib.closing(db.Connection(dsn, "loom master", 5)) as conn:
                instances.mark_dead(conn, identity)
            return
        except psycopg2.Error:
            if os.getppid() != master:  # the whole gunicorn has ended: nothing of it may stay behind
                return
            time.sleep(instances.RETRY_PERIOD)
