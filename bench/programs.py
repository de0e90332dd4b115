"""The programs that benchmarks start: gunicorn with an application, and pgbench with a script."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loom import config, embedded


@contextlib.contextmanager
def gunicorn(
    application: str, dsn: str, threads: int, worker: str | None, folder: Path, requests: str = "off"
) -> Iterator[int]:
    """Runs one gunicorn with the settings of gunicorn.conf.py, for the bare application without our hooks.

    `requests`: of which of them a line is logged, to a file, and a row written to the database.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = folder / f"{port}.yaml"
    logging = f"output: {folder}/{port}.log\n  requests: {requests}"
    settings.write_text(f"server:\n  threads: {threads}\nlogging:\n  {logging}\n")
    arguments = [sys.executable, "-m", "gunicorn", "-c", str(config.resource("gunicorn.conf.py")), application]
    if application == "bench.bare:app":
        plain = folder / "bare.conf.py"
        plain.write_text(
            f"bind = '127.0.0.1:{port}'\nthreads = {threads}\nkeepalive = 75\ncontrol_socket_disable = True\n"
            f"worker_class = {worker or 'loom.server.worker.Worker'!r}\nloglevel = 'warning'\n"
        )
        arguments[4] = str(plain)
    elif worker:
        arguments += ["-k", worker]
    environ = {**os.environ, "DATABASE_DSN": dsn, "PORT": str(port), "LOOM_CONFIG": str(settings)}
    process = subprocess.Popen(arguments, env=environ, cwd=Path(__file__).parent.parent)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Run:
    """The result of pgbench: the number of transactions, and transactions per second."""

    transactions: int
    rate: float


def pgbench(dsn: str, script: str, folder: Path, *options: str, clients: int = 8) -> Run:
    """Runs the script in a loop, for `-T` seconds or `-t` times (in `options`). Raises CalledProcessError."""
    path = folder / "script.sql"
    path.write_text(script)
    output = subprocess.run(
        [embedded.binaries() / "pgbench", "-n", "-f", path, "-c", str(clients), "-j", "2", *options, dsn],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    ).stdout
    found = re.search(r"actually processed: (\d+)(?:.|\n)*tps = ([0-9.]+)", output)
    assert found is not None
    return Run(int(found[1]), float(found[2]))
