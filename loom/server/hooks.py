"""The functions that gunicorn.conf.py calls: read the settings in the master, register the workers."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import gunicorn
import psycopg2
from psycopg2.extensions import parse_dsn

from loom import credentials, db, embedded, errors, instances, metrics
from loom import log as logs
from loom.bounds import MIB
from loom.config import Config, ConfigError, DatabaseConfig, load
from loom.http import settings, siblings

log = logging.getLogger("loom.server")

M_MMAP_THRESHOLD = -3  # of malloc.h
TRIED_GUNICORN = "27.0."  # the worker builds on inner classes of gunicorn


class MasterSettings(NamedTuple):
    """What a master has read. `logging` is for logging.config.dictConfig; `dsn` may be that of the embedded server."""

    settings: Config
    logging: dict[str, Any]
    dsn: str


_last: MasterSettings | None = None


def read_settings() -> MasterSettings:
    """In a gunicorn master: read the settings, open the log and the embedded database.

    gunicorn calls it (through gunicorn.conf.py) at its start and at SIGHUP. An error prevents the start; at SIGHUP it
    is logged, and the settings read before stay in force.
    """
    global _last
    try:
        config = load()
        handlers = _open_log(config)
        database = config.database
        if not gunicorn.__version__.startswith(TRIED_GUNICORN):
            versions = {"version": gunicorn.__version__, "tried": TRIED_GUNICORN}
            log.warning("gunicorn-not-tried", extra={"fields": versions})
        if database.pool_max > config.server.threads and config.sources["database.pool_max"] != "default":
            more = {"pool_max_conns": database.pool_max, "threads": config.server.threads}
            log.warning("pool-exceeds-threads", extra={"fields": more})
        if _shows_password(config):
            log.warning("settings-are-readable", extra={"fields": {"source": config.sources["database.dsn"]}})
        # The workers inherit the master's shared lock on the folder.
        dsn = embedded.use(Path(database.folder)) if database.type == "embedded" else database.dsn
    except (ConfigError, embedded.ServerError) as exc:
        if _last is None:
            raise SystemExit(f"Error: {exc}") from None
        _open_log(_last.settings)
        log.error("settings-kept", extra={"fields": {"reason": str(exc)}})
    else:
        _last = MasterSettings(config, handlers, dsn)
        if config.server.workers > 1:
            siblings.open_folder()
        settings.inherit(config)
    return _last


def _open_log(config: Config) -> dict[str, Any]:
    """A format that somebody has chosen is the one on a terminal, too."""
    chosen = config.sources["logging.format"] != "default"
    return logs.setup(config.logging, None if chosen else config.server.http_port)


def _shows_password(config: Config) -> bool:
    """Whether the password of the DSN stands in a file that every user of this host can read."""
    password = parse_dsn(config.database.dsn).get("password")
    file = Path(config.database.dsn_file or config.sources["database.dsn"].rpartition(":")[0])
    with contextlib.suppress(OSError):
        if password and file.stat().st_mode & 0o004:
            return not {password, quote(password, safe="")}.isdisjoint(re.split(r"[\s:@'\"=]", file.read_text()))
    return False


# The master creates a worker's identity before the fork, so that it can always mark the worker dead. Both see it in
# shared memory. The worker writes each later identity there, and GONE after an orderly end.
GONE = bytes(16)
_replaceable = 0  # workers that have died, and that the next ones replace


def before_fork(worker: Any, dsn: str) -> None:
    """pre_fork, in the master."""
    global _replaceable
    worker.dsn = dsn  # after a later SIGHUP, new workers may use another database
    worker.identity = mmap.mmap(-1, len(GONE))
    worker.identity[:] = uuid.uuid4().bytes
    worker.replaces_dead, _replaceable = _replaceable > 0, max(0, _replaceable - 1)


def after_fork(worker: Any, config: Config) -> instances.Instance:
    """post_fork, in the worker. If the schema does not fit, the whole gunicorn ends, with one line in the log."""

    def report_identity(identity: bytes) -> None:
        worker.identity[:] = identity or GONE

    # glibc keeps freed blocks of up to 32 MiB for each thread: at its peak, a worker had 283 MiB instead of 192.
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    if worker.replaces_dead:
        metrics.count_failover("instance_replaced")
    try:
        return instances.start(config, worker.dsn, str(uuid.UUID(bytes=worker.identity[:])), report_identity)
    except errors.SchemaError as exc:
        log.critical("schema-does-not-fit", extra={"fields": {"reason": str(exc)}})
        sys.exit(instances.BOOT_ERROR)


def after_load(worker: Any) -> None:
    """post_worker_init, in the worker."""
    from loom.http.application import Application  # here, since the master does not load the application
    from loom.http.metrics import traffic
    from loom.routes.metrics import share_regularly
    from loom.traffic import Recorder

    Recorder(traffic).start()
    if siblings.shared() and isinstance(worker.wsgi, Application):
        share_regularly(worker.wsgi)


def child_died(worker: Any) -> None:
    """child_exit, in the master: marks the worker dead unless it ended in order.

    It does so in another process, since a slow database must not delay the worker that gunicorn forks next.
    """
    global _replaceable
    siblings.forget(worker.pid)
    identity = worker.identity[:]
    worker.identity.close()
    if identity == GONE:
        return
    _replaceable += 1
    master = os.getpid()
    if os.fork() == 0:
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(60)
            os.closerange(3, 4096)
            database = _last.settings.database if _last is not None else DatabaseConfig()
            _mark_dead(partial(credentials.dsn_of, database, worker.dsn), str(uuid.UUID(bytes=identity)), master)
        finally:
            os._exit(0)


def _mark_dead(dsn: Callable[[], str], identity: str, master: int) -> None:
    while True:
        try:
            with contextlib.closing(db.Connection(dsn(), "loom master", 5)) as conn:
                instances.mark_dead(conn, identity)
            return
        except psycopg2.Error:
            if os.getppid() != master:  # gunicorn itself has ended, and no process of it may stay behind
                return
            time.sleep(instances.RETRY_PERIOD)
