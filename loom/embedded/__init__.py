"""PostgreSQL in a folder: a real server, which runs while a process uses it (its programs: see programs.py).

Two locked files control it. The kernel releases a lock when its last holder ends, however it ends, so no lock can be
left behind:

users     a shared lock of each process that uses the folder, and of the children that it forks. When the launcher gets
          the lock exclusively, the last user has ended, and the launcher stops the server. A new user waits until then.
launcher  an exclusive lock, from before the launcher starts until it, the server and every back end have ended (they
          all inherit it). So there are never two servers, and its holder knows that a postmaster.pid is stale.

The launcher is `python -m loom.embedded FOLDER DESCRIPTOR` in a session of its own. If it dies, the kernel tells
the server to shut down (Linux; elsewhere such a server runs on), and the next use() or revive() starts both again.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psycopg2
from psycopg2.extensions import make_dsn

from loom.embedded.programs import ServerError, binaries, parent_bound, user_prefix

__all__ = ["ServerError", "binaries", "leave", "parent_bound", "revive", "use", "user_prefix"]

USER = DATABASE = "loom"
PORT = 5432  # only used in the name of the socket
SOCKET_PATH_BYTES = 103  # sockaddr_un on macOS; Linux has 107

_shared_locks: dict[
    Path, int
] = {}  # descriptors of our shared lock on each folder's `users`; the lock lasts while one is open


def use(folder: Path, timeout: float = 60.0) -> str:
    """Keep a server running in this folder while this process or a child lives; return the DSN of database `loom`.

    Starts the server if needed and waits up to `timeout` seconds until it answers. May be called repeatedly.
    Raises ServerError, with the end of the server's log.
    """
    folder = folder.absolute()
    deadline = time.monotonic() + timeout
    binaries()
    _take_share(folder, deadline)
    starts = 0
    while True:
        with suppress(psycopg2.Error, OSError):
            return _database(folder)
        starts += revive(folder)
        if starts > 5 or time.monotonic() > deadline:
            raise ServerError(f"PostgreSQL in {folder} does not start. Its log ends:\n{_last_lines(folder)}")
        time.sleep(0.05)


def revive(folder: Path) -> bool:
    """Start a launcher if none runs, and return whether one was started. Does not wait for the server.

    Cheap enough (two opens and a flock) to be called before each new connection to the folder.
    Raises ServerError when the folder is missing or not accessible.
    """
    try:
        with os.fdopen(open_in(folder, "launcher")) as lock, os.fdopen(open_in(folder, "postgres.log")) as log:
            if not flock(lock.fileno(), fcntl.LOCK_EX):
                return False
            subprocess.run(  # returns when the launcher has moved into the background with the lock
                [sys.executable, "-m", "loom.embedded", str(folder.absolute()), str(lock.fileno())],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
                check=False,
            )
            return True
    except OSError as error:
        raise ServerError(f"Cannot use {folder} for PostgreSQL: {error}") from None


def leave(folder: Path, timeout: float = 10.0) -> None:
    """Stop using the folder. If no other process uses it, wait up to `timeout` seconds until the server has ended."""
    folder = folder.absolute()
    os.close(_shared_locks.pop(folder))
    deadline = time.monotonic() + timeout
    with os.fdopen(open_in(folder, "users")) as users, os.fdopen(open_in(folder, "launcher")) as launcher:
        while not flock(launcher.fileno(), fcntl.LOCK_EX) and time.monotonic() < deadline:
            alone = flock(users.fileno(), fcntl.LOCK_EX)
            if not alone and flock(users.fileno(), fcntl.LOCK_SH):
                return
            fcntl.flock(users, fcntl.LOCK_UN)
            time.sleep(0.05)


def _take_share(folder: Path, deadline: float) -> None:
    if folder in _shared_locks:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (
            any(folder.iterdir()) and not (folder / "users").exists()
        ):  # in this order: `users` is the first file that we create
            raise ServerError(f"{folder} contains other files: set database.folder to a folder of its own.")
        folder.chmod(0o700)  # the server trusts everybody who can open the socket
        users = open_in(folder, "users")
    except OSError as error:
        raise ServerError(f"Cannot use {folder} for PostgreSQL: {error}; set database.folder.") from None
    while not flock(users, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            os.close(users)
            raise ServerError(f"The former server in {folder} does not stop.\n{_last_lines(folder)}")
        time.sleep(0.05)
    os.set_inheritable(users, True)
    _shared_locks[folder] = users


def open_in(folder: Path, name: str) -> int:
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    if os.geteuid() == 0:
        os.fchown(descriptor, folder.stat().st_uid, folder.stat().st_gid)
    return descriptor


def flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def socket_folder(folder: Path) -> Path:
    """Return the folder of the socket: `folder`, or the target of its link `socket` if the path is unusable."""
    path = os.fsencode(folder / f".s.PGSQL.{PORT}")
    if len(path) <= SOCKET_PATH_BYTES and b"," not in path:  # libpq reads a comma as a list of hosts
        return folder
    short = Path(os.readlink(folder / "socket"))
    if short.stat().st_uid != folder.stat().st_uid:  # removed by a cleaner of /tmp, and created again by another user
        raise PermissionError(f"{short} belongs to another user")
    return short


def _database(folder: Path) -> str:
    host = str(socket_folder(folder))
    conn = psycopg2.connect(make_dsn(host=host, port=PORT, user=USER, dbname="postgres", connect_timeout=5))
    try:
        conn.autocommit = True
        with conn.cursor() as cursor, suppress(psycopg2.errors.DuplicateDatabase, psycopg2.errors.UniqueViolation):
            cursor.execute("SELECT FROM pg_database WHERE datname = %s", (DATABASE,))
            if cursor.rowcount == 0:
                cursor.execute(f"CREATE DATABASE {DATABASE}")
    finally:
        conn.close()
    return make_dsn(host=host, port=PORT, user=USER, dbname=DATABASE)


def _last_lines(folder: Path) -> str:
    with suppress(OSError):
        return "\n".join(dict.fromkeys((folder / "postgres.log").read_text(errors="replace").splitlines()[-8:]))
    return ""
