"""Writes all shared state into one file: a stream of rows from one snapshot, in constant memory."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec
import psycopg2
from psycopg2.extensions import cursor as Cursor

from loom import db
from loom.db.connection import translate
from loom.db.schema import VERSION as SCHEMA
from loom.transfer.archive import FORMAT, SECRET, SEQUENCES, TABLES, VERSION, Header
from loom.transfer.errors import SourceError

CHUNK = 2**20  # bytes that are compressed at once
WAITING = 4  # chunks that may wait for it
LEVEL = 1  # of the compression: the next ones take twice the time for a tenth less
CONNECT_SECONDS = 10.0


def export(dsn: str, file: Path, progress: Callable[[int, int, str], None] = lambda *_: None) -> dict[str, int]:
    """Writes the file, and returns the rows of each table. What was there is replaced only by a whole file.

    Raises Unavailable, and SourceError when the file cannot be written.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        conn = db.Connection(dsn, "loom export", CONNECT_SECONDS)
    except psycopg2.Error as exc:
        raise translate(exc) from exc
    try:
        with partial.open("wb") as out, conn.raw.cursor() as cur:
            rows = _export(cur, out, progress)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
        return rows
    except psycopg2.Error as exc:
        raise translate(exc) from exc
    except OSError as exc:
        raise SourceError(f"{file}: cannot be written: {exc.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
        conn.close()


def _export(cur: Cursor, out: BinaryIO, progress: Callable[[int, int, str], None]) -> dict[str, int]:
    cur.execute("SET statement_timeout = 0; SET extra_float_digits = 1; SET jit = off")
    cur.connection.autocommit = False
    cur.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
    stream = _Stream(out)
    try:
        stream.line(msgspec.json.encode(_header(cur)))
        counts = {}
        for table in TABLES:
            stream.line(msgspec.json.encode(["table", table]))
            stream.rows = 0
            cur.copy_expert(f"COPY (SELECT row_to_json(t) FROM ({_rows(table)}) AS t) TO STDOUT", stream)
            counts[table] = stream.rows
            progress(sum(counts.values()), 0, f"writing {table}")
        stream.end(counts)
    finally:
        stream.close()
    cur.connection.rollback()
    return counts


def _rows(table: str) -> str:
    if table == "config":
        return f"SELECT * FROM config WHERE key !~* '{SECRET}'"
    if table == "events":
        return f"""
            SELECT place, type, entity_type, entity_id, version, project_id, actor, instance_id, request_id,
                   proxy_request_id, timestamp,
                   CASE WHEN entity_type = 'config' AND entity_id ~* '{SECRET}' THEN '{{}}' ELSE changes END AS changes
              FROM events
            """
    if table == "cluster":
        return "SELECT only_row, events_forgotten, fencing_base FROM cluster"
    if table == "event_gaps":
        return "SELECT first, last FROM event_gaps"  # xid is of this server
    return f"SELECT * FROM {table}"


def _header(cur: Cursor) -> Header:
    columns = {}
    for table in TABLES:
        cur.execute(f"SELECT * FROM ({_rows(table)}) AS t LIMIT 0")
        columns[table] = [column.name for column in cur.description or ()]
    sequences = {}
    for name in SEQUENCES:
        cur.execute(f"SELECT last_value FROM {name}")
        ((sequences[name],),) = cur.fetchall()
    cur.execute("SELECT clock_timestamp()::text")
    ((now,),) = cur.fetchall()
    return Header(FORMAT, VERSION, SCHEMA, now, columns, sequences)


class _Stream:
    """What COPY writes to: rows are compressed by another thread meanwhile."""

    def __init__(self, out: BinaryIO) -> None:
        self.rows = 0
        self._out, self._digest = out, hashlib.sha256()
        self._compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, 31)  # 31: with gzip's header
        self._parts: list[bytes] = []
        self._size = 0
        self._chunks: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self._failed: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="export", daemon=True)
        self._thread.start()

    def write(self, row: bytes) -> int:
        """One row, as COPY sends it: JSON, in which each backslash is doubled."""
        self.rows += 1
        self._parts.append(row)
        self._size += len(row)
        if self._size >= CHUNK:
            self._flush()
        return len(row)

    def line(self, text: bytes) -> None:
        """A line between the rows."""
        self._parts.append(text.replace(b"\\", b"\\\\") + b"\n")
        self._flush()

    def end(self, counts: dict[str, int]) -> None:
        self._flush()
        self._chunks.put(None)
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        last = msgspec.json.encode(["end", {"rows": counts, "sha256": self._digest.hexdigest()}])
        self._out.write(self._compressor.compress(last + b"\n") + self._compressor.flush())

    def close(self) -> None:
        """Ends the thread, if the export has failed."""
        while self._thread.is_alive():
            try:
                self._chunks.put(None, timeout=0.1)
            except queue.Full:
                self._chunks.get()
            self._thread.join(0.1)

    def _flush(self) -> None:
        chunk, self._parts, self._size = b"".join(self._parts), [], 0
        if self._failed is not None:
            raise self._failed
        self._chunks.put(chunk)

    def _work(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            if self._failed is None:
                try:
                    chunk = chunk.replace(b"\\\\", b"\\")
                    self._digest.update(chunk)
                    self._out.write(self._compressor.compress(chunk))
                except OSError as exc:
                    self._failed = exc
