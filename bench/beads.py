"""Speed of claims, at sizes from 20 thousand to a million beads, compared with procrastinate's fetch of a job.

    python -m bench.beads [--seconds 60] [--rounds 3] [--sizes 20k,100k,1m,blocked] [--claims 200000] [--clients 8]

Both run on one PostgreSQL, all sizes of both in turns, each size in its own database. Loom runs claim_next(), not
prepared, as psycopg2 sends it. procrastinate runs its own schema.sql and its statement fetch_job, prepared, as its
driver does after five calls, in one round trip (its pool would also send BEGIN and COMMIT). pgbench is the client, so
that no Python code is measured.

Only claims are counted. The number of ready beads stays the same: ten times a second another session deletes what was
claimed and inserts as many new rows at the end of the queue. Both systems do this with one statement in which triggers
do not fire, so that the cost of creating rows is not measured. After each run the tables are vacuumed, so that the next
run finds no dead rows; during a run only autovacuum does this. A run must be long enough for it: at a million,
procrastinate's table is vacuumed after 100 thousand claims, and until then each claim skips more dead rows.

`blocked` is 100 thousand ready beads and a million beads that wait for another one. procrastinate has no such state:
its table has a million finished jobs instead, which the index of its queue leaves out.

Further, at 100 thousand: each system again while another session holds a snapshot; and `--claims` claims without a
pause, the last fifth compared with the first. At a million: the last page of the list, over HTTP, compared with the
first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn

from bench.programs import gunicorn, pgbench
from loom import embedded
from loom.db.schema import TEXT as SCHEMA
from loom.http.answer import encode_cursor

CLAIM = """
\\set agent random(1, 1000)
SELECT claim_next('agent-:agent', 1800, NULL, NULL, NULL, NULL)::text AS answer;
"""
SIZES = {"20k": (20_000, 0), "100k": (100_000, 0), "1m": (1_000_000, 0), "blocked": (100_000, 1_000_000)}


@dataclass(frozen=True)
class Queue:
    """One of the two systems: how its tables are filled, how it claims, and how claimed rows are replaced."""

    name: str
    schema: str
    fill: str  # with %(ready)s and %(others)s
    claim: str  # pgbench's script
    protocol: str
    replace: str  # replaces all claims after the event %(after)s; returns their number, and the last event
    last_event: str
    ready: str  # counts the ready rows
    tables: str


def loom_queue() -> Queue:
    return Queue(
        name="loom",
        schema=SCHEMA,
        fill="""
            INSERT INTO projects (id, name) VALUES ('bench', 'bench');
            INSERT INTO agents (id, name) SELECT 'agent-' || n, 'agent' FROM generate_series(1, 1000) n;
            INSERT INTO beads (id, title, description, priority, project_id, due_date, created_at)
            SELECT 'bd-' || n, 'Bead ' || n, repeat('x', 200), n %% 4, 'bench',
                   CASE WHEN n %% 10 = 0 THEN clock_timestamp() + INTERVAL '1 day' END, clock_timestamp()
              FROM generate_series(1, %(ready)s + %(others)s) n;
            -- The beads that wait are blocked by one that is in progress.
            INSERT INTO beads (id, title, status, project_id) VALUES ('blocker', 'blocker', 'in_progress', 'bench');
            UPDATE beads SET blocked_by = '{blocker}', open_blockers = 1
             WHERE id <> 'blocker'
               AND substr(id, 4)::bigint * %(ready)s %% (%(ready)s + %(others)s) >= %(ready)s;
            INSERT INTO bead_blockers SELECT id, 'blocker' FROM beads WHERE open_blockers = 1;
            CREATE SEQUENCE further;
            -- As acting_as() gives them, and no agent is ever busy.
            DO $$ BEGIN
                EXECUTE format('ALTER DATABASE %%I SET loom.settings = %%L', current_database(),
                               '{"agents.max_concurrent": 1000000, "beads.max_failures": 5, "beads.max_attempts": 20}');
            END $$;
        """,
        claim=CLAIM,
        protocol="simple",
        replace="""
            WITH claimed AS (
                SELECT place, entity_id FROM events WHERE place > %(after)s
            ), gone AS (
                DELETE FROM beads WHERE id IN (SELECT entity_id FROM claimed) RETURNING *
            ), made AS (
                INSERT INTO beads (id, title, description, priority, project_id, due_date, created_at)
                SELECT 'more-' || nextval('further'), title, description, priority, project_id, due_date,
                       clock_timestamp()
                  FROM gone
            )
            SELECT (SELECT count(*) FROM gone), (SELECT max(place) FROM claimed)
        """,
        last_event="SELECT max(place) FROM events",
        ready="SELECT count(*) FROM beads WHERE status = 'open' AND open_blockers = 0",
        tables="beads, agents, events, claims",
    )


def procrastinate_queue() -> Queue:
    """Raises SystemExit if procrastinate is not installed."""
    spec = find_spec("procrastinate")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("procrastinate is not installed: make bench BENCH=beads installs it")
    sql = Path(spec.submodule_search_locations[0], "sql")
    fetch = sql.joinpath("queries.sql").read_text().partition("-- fetch_job --")[2].partition(";")[0]
    return Queue(
        name="procrastinate",
        schema=sql.joinpath("schema.sql").read_text(),
        fill="""
            SELECT procrastinate_register_worker_v1() FROM generate_series(1, 100);
            INSERT INTO procrastinate_jobs (queue_name, task_name, priority, args, status)
            SELECT 'default', 'work', n %% 4, jsonb_build_object('title', 'Bead ' || n, 'text', repeat('x', 200)),
                   CASE WHEN n::bigint * %(ready)s %% (%(ready)s + %(others)s) < %(ready)s
                        THEN 'todo' ELSE 'succeeded' END::procrastinate_job_status
              FROM generate_series(1, %(ready)s + %(others)s) n
        """,
        claim="\\set worker :client_id + 1\n"
        + fetch.replace("%(queues)s", "NULL").replace("%(worker_id)s", ":worker")
        + ";\n",
        protocol="prepared",
        replace="""
            WITH claimed AS (
                SELECT id, job_id FROM procrastinate_events WHERE id > %(after)s AND type = 'started'
            ), gone AS (
                DELETE FROM procrastinate_jobs WHERE id IN (SELECT job_id FROM claimed) RETURNING *
            ), made AS (
                INSERT INTO procrastinate_jobs (queue_name, task_name, priority, args)
                SELECT queue_name, task_name, priority, args FROM gone
            )
            SELECT (SELECT count(*) FROM gone), (SELECT max(id) FROM claimed)
        """,
        last_event="SELECT max(id) FROM procrastinate_events",
        ready="SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'",
        tables="procrastinate_jobs, procrastinate_events, procrastinate_workers",
    )


@contextlib.contextmanager
def connect(dsn: str) -> Iterator[psycopg2.extensions.cursor]:
    """One session; each statement is a transaction of its own."""
    conn = psycopg2.connect(dsn)
    conn.autocommit = True
    try:
        with conn.cursor() as cursor:
            yield cursor
    finally:
        conn.close()


def one(cursor: psycopg2.extensions.cursor, sql: str) -> Any:
    cursor.execute(sql)
    return cursor.fetchall()[0][0]


class Replacer(threading.Thread):
    """Keeps the number of ready rows constant from `start()` to `finish()`; `replaced` counts the new rows."""

    PERIOD = 0.1  # seconds
    OVERLAP = 100  # events that are read again, since a smaller number may be committed after a greater one

    def __init__(self, dsn: str, queue: Queue) -> None:
        super().__init__(daemon=True)
        self._dsn, self._queue = dsn, queue
        self._over = threading.Event()
        self.replaced = 0

    def run(self) -> None:
        with connect(self._dsn) as cursor:
            cursor.execute("SET session_replication_role = replica")
            last = one(cursor, self._queue.last_event) or 0
            over = False
            while not over:
                over = self._over.wait(self.PERIOD)
                cursor.execute(self._queue.replace, {"after": last - self.OVERLAP})
                count, newest = cursor.fetchall()[0]
                self.replaced += count
                last = newest or last

    def finish(self) -> None:
        self._over.set()
        self.join()


class Bench:
    """Both queues, at one of SIZES, in their own database."""

    def __init__(self, dsn: str, size: str, folder: Path, clients: int) -> None:
        self._server, self._folder, self._clients = dsn, folder, clients
        self.ready, self.others = SIZES[size]
        self._database = f"loom_bench_{size}"
        self.dsn = make_dsn(dsn, dbname=self._database)

    def __enter__(self) -> Bench:
        with connect(self._server) as cursor:
            cursor.execute(f"DROP DATABASE IF EXISTS {self._database}")
            cursor.execute(f"CREATE DATABASE {self._database}")
        return self

    def __exit__(self, *_: object) -> None:
        with connect(self._server) as cursor:
            cursor.execute(f"DROP DATABASE {self._database}")

    def fill(self, queue: Queue) -> None:
        with connect(self.dsn) as cursor:
            cursor.execute(queue.schema)
            cursor.execute("SET session_replication_role = replica")
            cursor.execute(queue.fill, {"ready": self.ready, "others": self.others})
        self._settle(queue)

    def _settle(self, queue: Queue) -> None:
        with connect(self.dsn) as cursor:
            cursor.execute(f"VACUUM (ANALYZE) {queue.tables}")
            cursor.execute("CHECKPOINT")

    def claims(self, queue: Queue, *length: str) -> float:
        """Claims per second. `length`: options of pgbench. Raises RuntimeError if claims and replaced rows differ."""
        with connect(self.dsn) as cursor:
            replacer = Replacer(self.dsn, queue)
            replacer.start()
            try:
                done = pgbench(
                    self.dsn, queue.claim, self._folder, "-M", queue.protocol, *length, clients=self._clients
                )
            finally:
                replacer.finish()
            if (done.transactions, one(cursor, queue.ready)) != (replacer.replaced, self.ready):
                raise RuntimeError(f"{queue.name}: {done.transactions} claims, but {replacer.replaced} replaced")
        self._settle(queue)
        return done.rate

    def fifths(self, queue: Queue, claims: int) -> list[float]:
        """Claims per second in each fifth of a number of claims without a pause."""
        each = claims // self._clients
        self.claims(queue, "-t", str(each), "-l", "--log-prefix=claims")
        ended: list[float] = []
        for path in self._folder.glob("claims.*"):
            for line in path.read_text().splitlines():
                words = line.split()
                ended.append(int(words[4]) + int(words[5]) / 1e6)
            path.unlink()
        ended.sort()
        fifth = (len(ended) - 1) // 5
        return [fifth / (ended[n + fifth] - ended[n]) for n in range(0, 5 * fifth, fifth)]

    def pages(self, requests: int = 200) -> tuple[float, float]:
        """Milliseconds for the first and for the last page of the list, over HTTP; medians."""
        with connect(self.dsn) as cursor:
            start = one(cursor, "SELECT min(id) FROM (SELECT id FROM beads ORDER BY id DESC LIMIT 101) AS b")
        paths = ("/api/v1/beads?limit=100", f"/api/v1/beads?limit=100&after={encode_cursor(start)}")
        times: tuple[list[float], list[float]] = ([], [])
        with gunicorn("app:app", self.dsn, 8, None, self._folder) as port:
            conn = HTTPConnection("127.0.0.1", port)
            for _ in range(requests):
                for path, taken in zip(paths, times, strict=True):
                    began = time.perf_counter()
                    conn.request("GET", path)
                    answer = conn.getresponse()
                    beads = json.loads(answer.read())
                    if answer.status != 200 or len(beads) != 100:
                        raise RuntimeError(f"{path}: {answer.status}, {len(beads)} beads")
                    taken.append(1000 * (time.perf_counter() - began))
            conn.close()
        return statistics.median(times[0]), statistics.median(times[1])

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Another session that holds a snapshot, as a backup does, so that dead rows cannot be removed."""
        with connect(self.dsn) as cursor:
            cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            one(cursor, "SELECT count(*) FROM pg_class")
            yield
            cursor.execute("COMMIT")


def alternate(benches: dict[str, Bench], queues: list[Queue], rounds: int, *length: str) -> dict[str, dict[str, float]]:
    """Median claims per second, by size and queue. The runs take turns; every second round is in reverse order."""
    turns = [(size, queue) for size in benches for queue in queues]
    rates: dict[tuple[str, str], list[float]] = {(size, queue.name): [] for size, queue in turns}
    for number in range(rounds):
        for size, queue in turns[:: -1 if number % 2 else 1]:
            rates[size, queue.name].append(benches[size].claims(queue, *length))
            print(f"  {size:8} {queue.name:14} {rates[size, queue.name][-1]:6.0f}", flush=True)
    return {size: {queue.name: statistics.median(rates[size, queue.name]) for queue in queues} for size in benches}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, default=60)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--sizes", default=",".join(SIZES))
    options.add_argument(
        "--claims", type=int, default=200_000, help="claims without a pause, to see them slow down; 0: none"
    )
    given = options.parse_args()
    queues = [loom_queue(), procrastinate_queue()]
    length = ("-T", str(given.seconds))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loom-bench-")))
        dsn = os.environ.get("DATABASE_DSN") or embedded.use(folder / "postgres")
        benches = {
            size: stack.enter_context(Bench(dsn, size, folder, given.clients)) for size in given.sizes.split(",")
        }
        for bench in benches.values():
            for queue in queues:
                bench.fill(queue)
        table = alternate(benches, queues, given.rounds, *length)
        if "1m" in benches:
            first, last = benches["1m"].pages()
            print(f"Pages of the list at a million: first {first:.1f} ms, last {last:.1f} ms, {last / first:.2f}")
        if "100k" in benches:
            with benches["100k"].snapshot():
                held = {"100k, snapshot held": benches["100k"]}
                table |= alternate(held, queues, given.rounds, *length)
            for queue in queues if given.claims else []:
                runs = [benches["100k"].fifths(queue, given.claims) for _ in range(given.rounds)]
                fifths = [statistics.median(each) for each in zip(*runs, strict=True)]
                print(f"{queue.name}: {given.claims} claims without a pause, by fifths", end="")
                print(*(f" {rate:.0f}" for rate in fifths), f" last / first {fifths[-1] / fifths[0]:.2f}", flush=True)
    print("| ready | Loom, claims/s | procrastinate, claims/s | ratio |\n|---|---|---|---|")
    for size, rates in table.items():
        ours, theirs = rates.values()
        print(f"| {size} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |")
    if {"1m", "20k"} <= table.keys():
        print(f"Loom, 1m / 20k: {table['1m']['loom'] / table['20k']['loom']:.2f}")


if __name__ == "__main__":
    main()
