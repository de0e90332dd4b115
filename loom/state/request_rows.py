"""Writes a row of request_logs for each HTTP request: in batches and in a thread, so that no request waits for it.

Rows wait in memory while the database is away; only those that find no place there are lost, and counted.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from typing import Any, NamedTuple

from loom import db, errors
from loom.config import Config
from loom.dsn import mask, may_hold_secret

log = logging.getLogger("loom.log")

MOST_ROWS = 10_000  # that wait: three seconds of a busy instance, 10 MB
BATCH = 500  # rows that are written together: while they are formatted, for 2 ms, no other thread runs
PERIOD = 1.0  # seconds between two looks at what waits, jittered by a fifth
DUPLICATE = "23505"
LOCK_SECONDS = 1.0  # for which a batch waits for a lock of the table
FLUSH_SECONDS = 1.0  # for which a process that ends waits until its rows are written
COLUMNS = (
    *("timestamp", "id", "request_id", "instance_id", "user_id", "method", "route", "path", "status_code"),
    *("latency_ms", "database_ms", "lock_name", "bead_id", "agent_id", "project_id"),
)
NAMED = ("lock", "bead", "agent", "project")  # what `named` of a row may say, in the order of the last columns
COPY = f"COPY request_logs ({', '.join(COLUMNS)}) FROM STDIN (FORMAT csv)"
GB = 10**9


class Row(NamedTuple):
    """One request, when it has ended. `ended`: time.monotonic(); `named`: the kind of `name`, which the path names."""

    ended: float
    request_id: str
    instance_id: str | None
    caller: str
    method: str | None
    route: str | None
    path: str
    status: int
    latency_ms: float
    database_ms: float
    named: str | None
    name: str | None


class RequestRows:
    """The rows of this process that are not written yet, and the thread that writes them."""

    def __init__(self, database: db.Database, settings: Callable[[], Config]) -> None:
        """`settings`: those in force."""
        self.dropped = 0  # rows that were lost so far; exact enough without a lock
        self._told = 0  # of these, how many the log has told of
        self._rows: deque[Row] = deque()
        self._batch: list[Row] = []  # what is being written
        self._text = ""  # the same for COPY: it stays the same when it is written again
        self._failure = ""  # the reason that the log has told of
        self._database, self._settings = database, settings
        self._connection = database.dedicated("request logs")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request-rows", daemon=True)

    def put(self, row: Row) -> None:
        if len(self._rows) < MOST_ROWS:
            self._rows.append(row)
        else:
            self.dropped += 1

    def usage(self) -> dict[str, int]:
        """How many rows wait to be written, and how many were lost."""
        return {"queued": len(self._rows) + len(self._batch), "dropped": self.dropped}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Writes what waits, for at most FLUSH_SECONDS, and ends the thread."""
        self._stopping.set()
        self._thread.join(FLUSH_SECONDS)

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD * random.uniform(0.8, 1.2)):
            self.write()
        self.write()
        self._connection.close()

    def write(self) -> None:
        """Writes what waits, batch by batch; the rest waits on if that fails."""
        while (self._batch or self._rows) and self._database.away is None:
            if not self._batch:
                self._batch = [self._rows.popleft() for _ in range(min(BATCH, len(self._rows)))]
            try:
                with self._connection.use(lock_seconds=LOCK_SECONDS) as conn:
                    failure = self._write_batch(conn)
            except (errors.Invalid, errors.Conflict) as exc:  # it would be refused again and again
                written = getattr(exc.__cause__, "pgcode", "") == DUPLICATE
                failure = "" if written else self._drop_batch(str(exc))
            except Exception as exc:
                if isinstance(exc, errors.Busy) or not isinstance(exc, errors.Unavailable):  # else told by the pool
                    self._tell(str(exc))
                return
            self._tell(failure)
            self._batch, self._text = [], ""
        if self.dropped > self._told and len(self._rows) < MOST_ROWS // 2 and not self._failure:
            lost, self._told = self.dropped - self._told, self.dropped
            log.warning("request-rows-dropped", extra={"fields": {"count": lost}})

    def _write_batch(self, conn: db.Connection) -> str:
        """Writes the batch, or drops it if the logs are full. Returns why it was dropped, or ""."""
        failure = ""
        conn.begin()
        try:
            oldest = time.monotonic() - self._batch[0].ended
            sql = "SELECT open_request_logs(make_interval(secs => %(oldest)s), %(most)s)"
            clock = db.value(conn, sql, oldest=oldest + 1, most=int(self._settings().logging.max_gb * GB))
            if clock is None and not self._text:
                failure = self._drop_batch("the rows of today have logging.max_gb")
            else:
                self._text = self._text or _csv(self._batch, clock.timestamp() - time.monotonic())
                conn.copy(COPY, self._text)
        except BaseException:
            with contextlib.suppress(Exception):
                conn.end("ROLLBACK")
            raise
        conn.end("COMMIT")
        return failure

    def _drop_batch(self, reason: str) -> str:
        self.dropped += len(self._batch)
        return reason

    def _tell(self, failure: str) -> None:
        """Logs why rows are not written: once, until the reason changes or ends."""
        if failure not in ("", self._failure):
            log.warning("request-rows-failed", extra={"fields": {"reason": failure}})
        self._failure = failure


def _csv(batch: list[Row], clock: float) -> str:
    """`clock`: what the database's clock is ahead of time.monotonic()."""

    def line(row: Row) -> tuple[Any, ...]:
        ended, request_id, instance_id, caller, method, route, path, status, latency, spent, named, name = row
        when = datetime.fromtimestamp(clock + ended, timezone.utc)
        names = [name if kind == named else None for kind in NAMED]
        about = (when, random.getrandbits(53), request_id, instance_id, caller, method, route, path)
        return (*about, status, latency, spent, *names)

    text = _joined(map(line, batch))
    if may_hold_secret(text) or "\0" in text:
        text = _joined(tuple(_clean(value) for value in line(row)) for row in batch)
    return text


def _joined(lines: Iterable[tuple[Any, ...]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(lines)
    return file.getvalue()


def _clean(value: Any) -> Any:
    """PostgreSQL has no NUL in a text."""
    return mask(value).replace("\0", "\ufffd") if isinstance(value, str) else value


current: RequestRows | None = None


def start(database: db.Database, settings: Callable[[], Config]) -> RequestRows:
    """In a worker: a row for each request of this process from now on."""
    global current
    current = RequestRows(database, settings)
    current.start()
    return current
