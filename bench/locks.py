"""Speed of locks: acquire and release over HTTP, compared with the limits of the framework and of the database.

    python -m bench.locks [--seconds 8] [--rounds 3] [--connections 16] [--threads 8,32] [--worker ...]

(a) Loom: one instance with its gunicorn.conf.py;
(b) pgbench with the same two statements: the database's limit;
(c) bench/bare.py with the same gunicorn settings: the framework's limit.
(d) Loom with a JSON line and a row in request_logs for each request, which (a) has not;
(e) Loom without these, and without metrics.
(a), (c), (d) and (e) run in turns on one PostgreSQL, `--rounds` times; the medians are compared.
"""

from __future__ import annotations

import argparse
import os
import re
import selectors
import socket
import statistics
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from bench.programs import gunicorn, pgbench
from loom import config, db, embedded

LOOM, LOGGED, SILENT, BARE = "loom", "logged", "silent", "bare"
RELEASE = {LOOM: "/api/v1/locks/{name}?fencing_token={token}", BARE: "/api/v1/locks/{name}/{token}"}
RELEASE[LOGGED] = RELEASE[SILENT] = RELEASE[LOOM]
TOKEN = re.compile(rb'"fencing_token": ?([0-9]+)')
PGBENCH = """
\\set name random(1, 1000000000)
SELECT fencing_token AS token FROM acquire_lock('bench-:name', 'bench', NULL, '30 s', NULL, false) \\gset
SELECT release_lock('bench-:name', :token, 'released', NULL);
"""


@dataclass
class Client:
    """One kept-alive connection that repeatedly acquires and releases a lock of its own."""

    kind: str
    port: int
    latencies: list[float] = field(default_factory=list)
    cycle: int = 0
    token: str = ""

    def __post_init__(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        self.prefix = uuid.uuid4().hex

    def send(self) -> None:
        name = f"{self.prefix}-{self.cycle}"
        if self.token:
            path, body = RELEASE[self.kind].format(name=name, token=self.token), ""
            head = f"DELETE {path} HTTP/1.1\r\nHost: x\r\n\r\n"
        else:
            body = '{"owner": "bench"}'
            head = f"POST /api/v1/locks/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.sent = time.perf_counter()
        self.socket.sendall((head + body).encode())

    def receive(self) -> bool:
        """Whether the response is complete. Raises RuntimeError if it is not a success."""
        self.buffer += self.socket.recv(65536)
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return False
        length = re.search(rb"(?i)content-length: ([0-9]+)", head)
        if length and len(body) < int(length[1]):
            return False
        if self.buffer[9:12] not in (b"201", b"204"):
            raise RuntimeError(self.buffer.decode())
        self.latencies.append(time.perf_counter() - self.sent)
        if self.token:
            self.token, self.cycle = "", self.cycle + 1
        else:
            match = TOKEN.search(body)
            assert match is not None
            self.token = match[1].decode()
        self.buffer = b""
        return True


def load(kind: str, port: int, connections: int, seconds: float) -> list[float]:
    """Latencies in seconds of all requests."""
    selector = selectors.DefaultSelector()
    clients = [Client(kind, port) for _ in range(connections)]
    for client in clients:
        selector.register(client.socket, selectors.EVENT_READ, client)
        client.send()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for key, _ in selector.select(1):
            if key.data.receive():
                key.data.send()
    for client in clients:
        client.socket.close()
    return [latency for client in clients for latency in client.latencies]


def row(title: str, rates: list[float], latencies: list[float]) -> None:
    ranked = sorted(latencies)
    p50, p99 = (1000 * ranked[int(len(ranked) * q)] for q in (0.5, 0.99)) if ranked else (0, 0)
    times = f"p50 {p50:6.2f} ms   p99 {p99:6.2f} ms" if ranked else ""
    print(f"{title:34} {statistics.median(rates):8.0f} requests/s   {times}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=8)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--connections", type=int, default=16)
    options.add_argument(
        "--threads", default=str(config.ServerConfig.threads), help="one or more numbers, separated by commas"
    )
    options.add_argument("--worker", help="another gunicorn worker class, such as sync")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="loom-bench-") as name:
        folder = Path(name)
        dsn = os.environ.get("DATABASE_DSN") or embedded.use(folder / "postgres")
        db.migrate(dsn)
        # Each run of the script is two requests.
        rate = 2 * pgbench(dsn, PGBENCH, folder, "-T", str(int(given.seconds))).rate
        row("(b) pgbench, 8 connections", [rate], [])
        for threads in map(int, given.threads.split(",")):
            print(f"{given.connections} connections, {threads} threads, {given.worker or 'our worker'}")
            rates: dict[str, list[float]] = {LOOM: [], LOGGED: [], SILENT: [], BARE: []}
            latencies: dict[str, list[float]] = {kind: [] for kind in rates}
            with (
                gunicorn("app:app", dsn, threads, given.worker, folder) as loom,
                gunicorn("app:app", dsn, threads, given.worker, folder, "all") as logged,
                gunicorn("bench.silent:app", dsn, threads, given.worker, folder) as silent,
                gunicorn("bench.bare:app", dsn, threads, given.worker, folder) as bare,
            ):
                ports = {LOOM: loom, LOGGED: logged, SILENT: silent, BARE: bare}
                for kind, port in ports.items():
                    load(kind, port, given.connections, 1)
                for _ in range(given.rounds):
                    for kind, port in ports.items():
                        taken = load(kind, port, given.connections, given.seconds)
                        rates[kind].append(len(taken) / given.seconds)
                        latencies[kind] += taken
            row("  (a) Loom, acquire + release", rates[LOOM], latencies[LOOM])
            row("  (d) Loom, a line and a row for each", rates[LOGGED], latencies[LOGGED])
            row("  (e) Loom, without metrics", rates[SILENT], latencies[SILENT])
            row("  (c) bare Flask, same statements", rates[BARE], latencies[BARE])
            ratios = [a / c for a, c in zip(rates[LOOM], rates[BARE], strict=True)]
            logged_ratios = [d / e for d, e in zip(rates[LOGGED], rates[SILENT], strict=True)]
            print(
                f"  d/e {statistics.median(logged_ratios):.2f} ({min(logged_ratios):.2f} to {max(logged_ratios):.2f})"
                f"   a/c {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                f"   a/b {statistics.median(rates[LOOM]) / rate:.2f}"
            )


if __name__ == "__main__":
    main()
