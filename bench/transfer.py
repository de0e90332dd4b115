"""Imports and exports beside COPY of the same rows into, and out of, the same indexed tables: rates and memory."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
from psycopg2.extensions import make_dsn

from loom import db, embedded
from loom.transfer import beads, export, importing, restore, sqlite
from loom.transfer.archive import Archive

AT = "2026-01-20 08:00:00.123456789-08:00"
TABLES = ("projects", "agents", "beads", "bead_blockers", "comments", "events")
TEXT = "A sentence of the length that a comment often has, and then some more words. "


def make(folder: Path, rows: int) -> None:
    """A database with one agent and three comments for each four rows, on a few beads."""
    conn = sqlite3.connect(folder / "old.db")
    conn.execute("CREATE TABLE agents (id PRIMARY KEY, name, role, persona_name, status, started_at, last_active)")
    conn.execute("CREATE TABLE bead_comments (id PRIMARY KEY, bead_id, author_id, content, created_at, updated_at)")
    agents = ((f"agent-{n}", f"Agent {n}", "", "default/engineer", "idle", AT, AT) for n in range(rows // 4))
    comments = ((f"c{n}", f"b-{n % 1000}", f"agent-{n}", TEXT, AT, AT) for n in range(rows - rows // 4))
    conn.executemany(f"INSERT INTO agents VALUES ({', '.join('?' * 7)})", agents)
    conn.executemany(f"INSERT INTO bead_comments VALUES ({', '.join('?' * 6)})", comments)
    conn.commit()
    conn.close()
    issues = ({"id": f"b-{n}", "title": TEXT, "created_at": "2026-01-20T08:00:00Z"} for n in range(1000))
    (folder / "issues.jsonl").write_text("".join(json.dumps(issue) + "\n" for issue in issues))


@contextmanager
def database(dsn: str, name: str) -> Iterator[str]:
    """An empty database with Loom's schema."""
    conn = psycopg2.connect(dsn)
    conn.autocommit = True
    cur = conn.cursor()
    cur.execute(f"DROP DATABASE IF EXISTS {name}")
    cur.execute(f"CREATE DATABASE {name}")
    own = make_dsn(dsn, dbname=name)
    db.migrate(own)
    try:
        yield own
    finally:
        cur.execute(f"DROP DATABASE {name} WITH (FORCE)")
        conn.close()


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def copy(dsn: str, folder: Path, into: bool) -> None:
    """COPY of all tables, in one transaction."""
    with closing(psycopg2.connect(dsn)) as conn, conn, conn.cursor() as cur:
        cur.execute("SET loom.importing = on")
        for table in TABLES:
            with (folder / table).open("rb" if into else "wb") as file:
                cur.execute(f"SELECT string_agg(attname, ', ' ORDER BY attnum) FROM pg_attribute"
                            f" WHERE attrelid = '{table}'::regclass AND attnum > 0 AND attname <> 'place'")  # fmt: skip
                ((columns,),) = cur.fetchall()
                cur.copy_expert(f"COPY {table} ({columns}) {'FROM STDIN' if into else 'TO STDOUT'}", file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dsn", help="a server on which databases may be made; default: the embedded one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loom-bench-"))
    try:
        measure(options.dsn or embedded.use(folder / "postgres"), folder, options.rows)
    finally:
        embedded.leave(folder / "postgres") if options.dsn is None else None
        shutil.rmtree(folder, ignore_errors=True)


def measure(dsn: str, folder: Path, rows: int) -> None:
    make(folder, rows)
    parts: dict[str, float] = {}
    began = time.monotonic()

    def progress(_: int, __: int, what: str) -> None:
        parts.setdefault(what, time.monotonic() - began)

    def read(report: importing.Report) -> importing.Source:
        yield from sqlite.read(folder / "old.db", report)
        yield from beads.read(folder / "issues.jsonl", report)

    with database(dsn, "bench_import") as target:
        took = timed(lambda: importing.run(target, "bench", read, importing.Options(), progress))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        writing = parts["comparing both sides"]
        out = timed(lambda: copy(target, folder, into=False))
        exporting = timed(lambda: export.export(target, folder / "export.gz"))
        with closing(psycopg2.connect(target)) as conn, conn.cursor() as cur:
            cur.execute("SELECT (SELECT count(*) FROM events)")
            ((events,),) = cur.fetchall()
    with database(dsn, "bench_copy") as target:
        into = timed(lambda: copy(target, folder, into=True))
    with database(dsn, "bench_restore") as target:
        restoring = timed(lambda: restore.restore(target, Archive(folder / "export.gz")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{rows:,} rows in the source, {events:,} events")
    print(f"import {writing:.1f} s ({rows / writing:,.0f} rows/s), with the comparison {took:.1f} s, {memory} MiB")
    print(f"COPY FROM {into:.1f} s: the rate is {into / writing:.2f} of it, and {into / took:.2f} with the comparison")
    print(f"export {exporting:.1f} s, COPY TO {out:.1f} s: {out / exporting:.2f}")
    print(f"import of the export {restoring:.1f} s; at most {peak} MiB")
    print("parts: " + ", ".join(f"{what} from {at:.1f} s" for what, at in parts.items()), file=sys.stderr)


if __name__ == "__main__":
    main()
