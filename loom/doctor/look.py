"""What the checks of `loom doctor` look at, and what each of them finds."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psycopg2

from loom import embedded
from loom.config import Config
from loom.db import Row
from loom.db.connection import Connection
from loom.dsn import connect_problem, parse


@dataclass(frozen=True)
class Result:
    """Of one check. `remedy` is a command, if one mends it, or what to do."""

    state: Literal["ok", "wrong", "unchecked"]
    text: str
    remedy: str = ""


def ok(text: str) -> Result:
    return Result("ok", text)


def wrong(text: str, remedy: str) -> Result:
    return Result("wrong", text, remedy)


def unchecked(text: str) -> Result:
    """The check cannot be made, which is no fault."""
    return Result("unchecked", text)


NO_SESSION = "there is no session with the database"


@dataclass(frozen=True)
class Limits:
    """From where on something is wrong. Names that end in _seconds are times."""

    oldest_server: int = 12
    newest_server: int = 18
    clock_seconds: float = 1.0
    transaction_seconds: float = 300.0
    row_lock_seconds: float = 5.0
    lock_seconds: float = 86_400.0  # that a lock is held by one grant
    contended_seconds: float = 60.0  # that a lock is held while others wait for it
    waiters: int = 50  # for one lock
    replica_seconds: float = 30.0
    replica_bytes: int = 256 * 2**20
    dead_rows: int = 20_000  # of one table, and so many times what autovacuum would allow:
    vacuums_missed: int = 3
    empty_bytes: int = 64 * 2**20  # of one table, which its live rows do not need
    overdue_seconds: float = 60.0  # that something should have been cleaned up


class Host(NamedTuple):
    """A server of the DSN. `address` is its IP address, "" if `name` must be resolved, or the folder of a socket."""

    name: str
    address: str
    port: int

    @property
    def is_folder(self) -> bool:
        return self.name.startswith(("/", "@"))

    def __str__(self) -> str:
        return f"{self.name}/.s.PGSQL.{self.port}" if self.is_folder else f"{self.name}:{self.port}"


# What libpq says of a connection that fails, the check that it belongs to, and the remedy. These are English texts:
# psycopg2 gives no SQLSTATE for them.
TROUBLES = (
    (r"could not translate host name|Name or service not known", "host name", "correct the host in database.dsn"),
    (
        r"too many clients|connection slots are reserved|too many connections for|no more connections allowed",
        "connections",
        'loom psql -c "ALTER SYSTEM SET max_connections = 200" as a superuser, then restart PostgreSQL;'
        " or lower pool_max_conns, or use pgBouncer",
    ),
    (
        r"is read-only|not read-write|could not make a writable connection|in recovery",
        "primary",
        "name all servers in database.dsn: host=a,b target_session_attrs=read-write",
    ),
    (
        r'database "[^\n]*" does not exist|no such database',
        "database",
        "as a superuser: psql postgres -c \"CREATE DATABASE {dbname} ENCODING 'UTF8' TEMPLATE template0\"",
    ),
    (
        r"permission denied for database",
        "database",
        'as a superuser: psql postgres -c "GRANT CONNECT ON DATABASE {dbname} TO {user}"',
    ),
    (
        r"does not support SSL|certificate|SSL error",
        "TLS",
        "compare sslmode and sslrootcert in database.dsn with ssl and pg_hba.conf of the server",
    ),
    (
        r"pg_hba\.conf",
        "login",
        "add a line to pg_hba.conf of the server, such as: hostssl {dbname} {user} samenet scram-sha-256; then"
        " SELECT pg_reload_conf()",
    ),
    (
        r"password authentication failed|SASL authentication failed|no password supplied|no such user"
        r"|role .* does not exist|not permitted to log in",
        "login",
        "correct user and password in database.dsn (or DATABASE_DSN), or as a superuser:"
        " psql postgres -c '\\password {user}'",
    ),
    (r"database system is", "login", "wait until PostgreSQL has started; its log says what it waits for"),
    (r"refused|timeout expired|timed out|No such file|unreachable|No route", "network", "systemctl status postgresql"),
)


class Look:
    """One examination: the settings, and a connection to the database if there is one."""

    def __init__(self, config: Config, url: str | None, limits: Limits) -> None:
        self.config, self.url, self.limits = config, url, limits
        self.timeout = config.database.timeout
        self.reachable = True  # unless the checks of name and network say otherwise
        self.trouble: tuple[str, Result] | None = None  # why there is no connection: the check, and what it found

    @cached_property
    def dsn(self) -> str:
        """Raises ServerError."""
        database = self.config.database
        if database.dsn:
            return database.dsn
        if not Path(database.folder, "users").exists():
            raise embedded.ServerError(f"There is no PostgreSQL in {database.folder} yet.")
        return embedded.use(Path(database.folder))

    @cached_property
    def parameters(self) -> dict[str, str]:
        return parse(self.dsn)

    @cached_property
    def hosts(self) -> list[Host]:
        """The servers of the DSN; empty if it names none, so that libpq takes its defaults."""
        names, addresses, ports = (self.parameters.get(key, "").split(",") for key in ("host", "hostaddr", "port"))
        count = max(len(names), len(addresses))
        names += addresses[len(names) :] if names != [""] else addresses
        addresses += [""] * count
        return [
            Host(name or addresses[i], addresses[i], int((ports[i] if len(ports) > 1 else ports[0]) or 5432))
            for i, name in enumerate([name for name in names if name or any(addresses)][:count])
        ]

    @cached_property
    def connection(self) -> Connection | None:
        if not self.reachable:
            return None
        try:
            conn = Connection(self.dsn, "loom doctor", self.timeout)
        except psycopg2.Error as exc:
            self.trouble = self._explain(connect_problem(str(exc)).removeprefix("database.dsn: "))
            return None
        conn.lock_seconds = 1.0
        return conn

    def _explain(self, text: str) -> tuple[str, Result]:
        values = {"dbname": "DATABASE", "user": "ROLE", **self.parameters}
        for pattern, check, remedy in TROUBLES:
            if re.search(pattern, text):
                return check, wrong(text, remedy.format_map(values))
        return "login", wrong(text, "look into the log of PostgreSQL")

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that can only read. Raises psycopg2.Error."""
        conn = self.connection
        if conn is None or not conn.usable:
            raise psycopg2.OperationalError("the connection is lost")
        conn.deadline = time.monotonic() + self.timeout
        conn.begin()
        try:
            conn.execute("SET TRANSACTION READ ONLY")
            yield conn
        finally:
            if not conn.lost:
                conn.end("ROLLBACK")

    def rows(self, sql: str, **params: Any) -> list[Row]:
        """Raises psycopg2.Error."""
        with self.reading() as conn:
            return conn.execute(sql, params)

    def row(self, sql: str, **params: Any) -> Row:
        return self.rows(sql, **params)[0]

    def close(self) -> None:
        conn = self.__dict__.get("connection")
        if conn is not None:
            conn.close()
