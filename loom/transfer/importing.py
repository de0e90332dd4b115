"""An import from beginning to end: read, settle, write, compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psycopg2
from psycopg2 import errors as pg
from psycopg2.extensions import cursor as Cursor

from loom import db, errors
from loom.db.connection import translate
from loom.transfer.kinds import KINDS
from loom.transfer.report import Report
from loom.transfer.settle import Conflict, settle
from loom.transfer.stage import Source, Stage
from loom.transfer.verify import verify
from loom.transfer.writer import Batch, Writer, batches

BATCH = 10_000
BATCH_AMONG_OTHERS = 200  # rows: a request that wants one of their names waits for that long
ATTEMPTS = 5  # of a batch that waits for a lock too long, or deadlocks
LOCK_SECONDS = 5
CONNECT_SECONDS = 10.0
KEY = 0x4C6F6F6E  # of the advisory lock that is held while an import runs

Progress = Callable[[int, int, str], None]  # rows done, rows in all (0: not known yet), of what


@dataclass(frozen=True)
class Options:
    on_conflict: Conflict = "fail"
    dry_run: bool = False
    resume: bool = False
    default_project: str = "imported"
    log_days: int = 30  # how long request logs are kept


def run(
    dsn: str, source: str, read: Callable[[Report], Source], options: Options, progress: Progress = lambda *_: None
) -> Report:
    """Imports what `read` gives. All or nothing, but with `resume` in batches that each commit.

    source: its name, by which a later run with `resume` knows it. The report says whether both sides are equal; if they
    are not, nothing is written. Raises Conflict, Unavailable.
    """
    report = Report(source)
    report.dry_run = options.dry_run
    try:
        conn = db.Connection(dsn, "loom import", CONNECT_SECONDS)
    except psycopg2.Error as exc:
        raise translate(exc) from exc
    try:
        with conn.raw.cursor() as cur:
            cur.execute("SET datestyle = 'ISO'; SET client_min_messages = 'warning'; SET statement_timeout = 0")
            cur.execute("SET jit = off; SET work_mem = '64MB'; SET maintenance_work_mem = '64MB'")
            conn.raw.autocommit = False
            _Import(cur, report, options, progress).run(read)
    except psycopg2.Error as exc:
        raise translate(exc) from exc
    finally:
        conn.close()
    return report


def refuse_instances(cur: Cursor, instead: str) -> None:
    cur.execute("SELECT count(*) FROM instances WHERE instance_status(status, last_heartbeat) <> 'dead'")
    (active,) = cur.fetchone() or (0,)
    if active:
        raise errors.Conflict(
            f"{active} instances are active, and one transaction for all rows would make their requests wait."
            f" Stop them{instead}."
        )


class _Import:
    def __init__(self, cur: Cursor, report: Report, options: Options, progress: Progress) -> None:
        self._cur, self._report, self._options, self._progress = cur, report, options, progress
        self._in_batches = options.resume and not options.dry_run

    def run(self, read: Callable[[Report], Source]) -> None:
        self._begin()
        self._alone()
        stage = Stage(self._cur, self._report, lambda rows, what: self._progress(rows, 0, what))
        stage.fill(read(self._report))
        self._progress(0, 0, "settling references")
        options = self._options
        settle(stage, self._report, options.on_conflict, options.default_project, options.log_days, options.resume)
        if options.dry_run and options.resume:  # among instances that serve, nothing is written and undone again
            self._cur.connection.rollback()
            return
        self._write(stage)
        self._progress(0, 0, "comparing both sides")
        equal = verify(stage, self._report)
        if equal:
            self._cur.execute("DELETE FROM imports WHERE source = %s", (self._report.source,))
        if equal and not options.dry_run:
            self._cur.connection.commit()
        else:
            self._cur.connection.rollback()

    def _begin(self) -> None:
        self._cur.execute(
            """
            SELECT acting_as('loom import', NULL, NULL, NULL, '{}'), set_config('loom.importing', 'on', true),
                   set_config('loom.cycles', 'later', true)
            """
        )

    def _alone(self) -> None:
        try:  # the session of one that was killed may last a moment longer
            self._cur.execute("SET LOCAL lock_timeout = '5s'; SELECT pg_advisory_lock(%s)", (KEY,))
        except pg.LockNotAvailable:
            raise errors.Conflict("Another import is running.") from None
        self._cur.execute("SET LOCAL lock_timeout = 0")
        if not self._options.resume:
            refuse_instances(self._cur, ", or use --resume, which writes in small batches")

    def _write(self, stage: Stage) -> None:
        writer = Writer(self._cur, self._report, self._in_batches)
        total, done = 0, 0
        for kind in KINDS:
            self._cur.execute(f"SELECT count(*) FROM {kind.staged}")
            total += (self._cur.fetchone() or (0,))[0]
        writer.prepare()
        for kind in KINDS:
            for batch in batches(stage, kind, BATCH_AMONG_OTHERS if self._in_batches else BATCH):
                if self._in_batches:
                    self._commit(writer, batch)
                else:
                    writer.write(batch)
                done += batch.rows
                self._progress(done, total, f"writing {kind.table}")
        writer.finish()

    def _commit(self, writer: Writer, batch: Batch) -> None:
        """Writes a batch and how far it goes, in a transaction of its own."""
        conn = self._cur.connection
        conn.commit()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._begin()
                self._cur.execute("SET LOCAL lock_timeout = %s", (f"{LOCK_SECONDS}s",))
                writer.write(batch)
                self._cur.execute(
                    """
                    INSERT INTO imports AS i VALUES (%s, %s, %s, %s)
                        ON CONFLICT (source, kind) DO UPDATE SET (level, n) = (excluded.level, excluded.n)
                     WHERE (i.level, i.n) < (excluded.level, excluded.n)
                    """,
                    (self._report.source, batch.kind.name, *batch.last),
                )
                conn.commit()
                return
            except (pg.DeadlockDetected, pg.LockNotAvailable):
                conn.rollback()
                if attempt == ATTEMPTS:
                    raise
