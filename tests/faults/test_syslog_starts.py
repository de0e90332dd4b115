"""With syslog on, as in the guide, every start serves.

30 of 150 did not: while the gunicorn master forked, a thread of it looked up the server's name and imported a module
for that. The worker got half of the module and answered 500 to every request.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import Client, Process, free_port, wait_until

ADDRESSES = ("localhost", "no-such-host.invalid", "127.0.0.1")
AT_A_TIME = 2


@contextlib.contextmanager
def served(folder: Path, dsn: str, host: str) -> Iterator[tuple[int, Process]]:
    """`loom serve`, and the status of its first answer."""
    port = free_port()
    config, log = folder / f"{port}.yaml", folder / f"{port}.log"
    config.write_text(f"logging: {{syslog: {{enabled: true, address: '{host}:9'}}}}\n")
    env = {"LOOM_CONFIG": str(config), "DATABASE_DSN": dsn, "PORT": str(port)}
    process = Process([sys.executable, "-c", "from loom.cli import main; main()", "serve"], log, env=env)

    def status() -> int | None:
        assert process.runs, process.last_lines()
        with contextlib.suppress(OSError), contextlib.closing(Client(port, 5)) as client:
            return client.get("/health").status
        return None

    try:
        yield wait_until(status, 60, 0.02), process
    finally:
        process.stop()


def test_every_start_with_syslog_serves(tmp_path: Path, dsn: str, long: bool) -> None:
    def start(number: int) -> tuple[str, int, bool]:
        # On one processor the master often forks while one of its threads is at work.
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
        host = ADDRESSES[number % len(ADDRESSES)]
        with served(tmp_path, dsn, host) as (status, process):
            said = process.log.read_text()
            return host, status, "cannot-serve" in said or "master-has-threads" in said

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        starts = Counter(pool.map(start, range(201 if long else 12)))
    print(starts)
    assert set(starts) == {(host, 200, False) for host in ADDRESSES}


@pytest.mark.parametrize("host", ADDRESSES)
def test_the_master_has_one_thread(tmp_path: Path, dsn: str, host: str) -> None:
    with served(tmp_path, dsn, host) as (_, process):
        assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 1
        unknown = process.log.read_text().count("syslog-unreachable")
        assert unknown == (1 if host == "no-such-host.invalid" else 0)
