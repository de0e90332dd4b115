"""A pgBouncer in front of a PostgreSQL, in transaction mode."""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn

from harness.postgres import SUPERUSER, Postgres, query
from harness.processes import Process, free_port, program, wait_until
from loom import embedded


class PgBouncer:
    """Passes connections on to `server`, each for one transaction; its files are in the server's folder."""

    def __init__(self, server: Postgres, pool_size: int = 20, text: str = "") -> None:
        """`text`: a configuration to use instead, whose port is 6432."""
        self.port = free_port()
        folder = server.folder
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": pool_size,
            "max_client_conn": 1000,
            "server_tls_sslmode": "disable",
            "server_login_retry": 1,  # seconds; the default of 15 would prolong an outage
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        target = f"* = host=127.0.0.1 port={server.port} user={SUPERUSER}"
        config = folder / "pgbouncer.ini"
        own = "\n".join(["[databases]", target, "[pgbouncer]", *lines, ""])
        config.write_text(text.replace("6432", str(self.port)) or own)
        config.chmod(0o644)
        identity = embedded.user_prefix(folder, server.data)  # pgBouncer refuses to be root, too
        binary = Path(program("pgbouncer", "pgbouncer"))
        self.process = Process([*identity, binary, config], folder / "pgbouncer.log", last=signal.SIGINT)
        wait_until(self._listens if text else self._answers, 20)

    def dsn(self, database: str, **more: Any) -> str:
        return make_dsn(host="127.0.0.1", port=self.port, user=SUPERUSER, dbname=database, **more)

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg2.OperationalError):
            return bool(query(self.dsn("postgres"), "SELECT 1"))
        return False

    def _listens(self) -> bool:
        assert self.process.runs, self.process.last_lines()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        self.process.stop(signal.SIGKILL)
