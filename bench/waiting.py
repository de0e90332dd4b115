"""Requests that wait for a lock: what they cost, and how fast the lock passes from one to the next.

    python -m bench.waiting [--waiters 2000] [--queue 300]

One instance keeps `--waiters` requests that wait for one lock: the time that GET /health/live and another lock take
beside them, the memory of the worker, and the CPU time of the worker and of PostgreSQL. Then `--queue` requests wait
for a lock in three instances, and each releases it as soon as it has it. A poll each 50 ms is the limit of that: a
request that is first in the queue waits for 25 ms on average.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import select
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

from bench.programs import gunicorn
from loom import db, embedded
from loom.locks.queue import LockPoller

LOCK = "/api/v1/locks/"
DSN = ""  # of the database; set by main()


def call(port: int, method: str, path: str, body: object = None) -> tuple[int, dict]:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read() or "{}")


def ask(port: int, name: str, owner: str) -> socket.socket:
    """Sends a request that waits for the lock."""
    body = json.dumps({"owner": owner, "wait_seconds": 30}).encode()
    head = f"POST {LOCK}{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(head + body)
    return sock


def hold_and_queue(ports: list[int], name: str, count: int) -> tuple[int, list[socket.socket]]:
    """Takes the lock, and lets `count` requests wait for it. Returns its token, and their connections."""
    status, held = call(ports[0], "POST", LOCK + name, {"owner": "holder", "ttl_seconds": 300})
    assert status == 201, held
    waiting = [ask(ports[number % len(ports)], name, f"w{number}") for number in range(count)]
    while call(ports[0], "GET", LOCK + name)[1]["waiting"] < count:
        time.sleep(0.1)
    return held["fencing_token"], waiting


def worker(port: int) -> int:
    """The process number of the worker that listens on a port."""
    instances = call(port, "GET", "/api/v1/instances")[1]
    return next(one["metadata"]["pid"] for one in instances if one["metadata"]["port"] == port)


def cpu_seconds(pids: list[int]) -> float:
    ticks = [Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[11:13] for pid in pids]
    return sum(int(tick) for pair in ticks for tick in pair) / os.sysconf("SC_CLK_TCK")


def cost(port: int, count: int) -> None:
    token, waiting = hold_and_queue([port], "many", count)
    back_ends = [pid for (pid,) in query("SELECT pid FROM pg_stat_activity WHERE application_name LIKE '%waiters'")]
    began, used, used_there = time.monotonic(), cpu_seconds([worker(port)]), cpu_seconds(back_ends)
    live: list[float] = []
    other: list[float] = []
    while time.monotonic() < began + 10:
        for seconds, method, path in ((live, "GET", "/health/live"), (other, "POST", LOCK + "other")):
            asked = time.perf_counter()
            call(port, method, path)
            seconds.append(1000 * (time.perf_counter() - asked))
        time.sleep(0.02)
    elapsed = time.monotonic() - began
    peak = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{worker(port)}/status").read_text())[0]
    print(f"{count} requests wait at one instance, for 10 s; the worker's largest memory {int(peak) / 1024:.0f} MiB")
    for name, seconds in (("/health/live", live), ("another lock", other)):
        print(f"  {name}: median {statistics.median(seconds):.1f} ms, longest {max(seconds):.1f} ms")
    shares = (cpu_seconds([worker(port)]) - used) / elapsed, (cpu_seconds(back_ends) - used_there) / elapsed
    print(f"  CPU of the worker {shares[0]:.2f}, of its poll in PostgreSQL {shares[1]:.2f} (of one core)")
    for sock in waiting:
        sock.close()
    call(port, "DELETE", f"{LOCK}many?fencing_token={token}")


def throughput(ports: list[int], count: int) -> None:
    token, waiting = hold_and_queue(ports, "queue", count)
    connections = {sock.fileno(): sock for sock in waiting}
    poll = select.poll()
    for sock in waiting:
        poll.register(sock, select.POLLIN)
    queue = [owner for (owner,) in query("SELECT owner FROM lock_waiters WHERE lock_name = 'queue' ORDER BY place")]
    call(ports[0], "DELETE", f"{LOCK}queue?fencing_token={token}")
    order: list[str] = []
    began = time.monotonic()
    while len(order) < count and time.monotonic() < began + 28:
        for fd, _ in poll.poll(1000):
            with connections.pop(fd) as sock:
                poll.unregister(fd)
                answer = sock.recv(65536)
            grant = json.loads(answer.partition(b"\r\n\r\n")[2])
            assert answer[9:12] == b"201", answer
            order.append(grant["owner"])
            call(ports[0], "DELETE", f"{LOCK}queue?fencing_token={grant['fencing_token']}")
    rate, limit = len(order) / (time.monotonic() - began), 2 / LockPoller.period
    right = "in the order of the queue" if order == queue[: len(order)] else "NOT in the order of the queue"
    print(f"{count} requests wait in three instances: {rate:.1f} grants/s, {right}; {rate / limit:.2f} of the limit")


def query(sql: str) -> list[tuple]:
    with contextlib.closing(db.Connection(DSN, "bench", 10)) as conn, conn.raw.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


@contextlib.contextmanager
def three(folder: Path) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(gunicorn("app:app", DSN, 8, None, folder)) for _ in range(3)]


def main() -> None:
    global DSN
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--waiters", type=int, default=2000)
    options.add_argument("--queue", type=int, default=300)
    given = options.parse_args()
    files = max(4 * given.waiters, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, max(files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
    with tempfile.TemporaryDirectory(prefix="loom-bench-") as name:
        folder = Path(name)
        DSN = os.environ.get("DATABASE_DSN") or embedded.use(folder / "postgres")
        db.migrate(DSN)
        with three(folder) as ports:
            cost(ports[0], given.waiters)
            throughput(ports, given.queue)


if __name__ == "__main__":
    main()
