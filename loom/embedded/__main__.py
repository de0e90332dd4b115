"""The launcher: runs the server of a folder until its last user has ended."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from loom.embedded import PORT, USER, flock, open_in, socket_folder
from loom.embedded.programs import binaries, parent_bound, user_prefix

LOG_BYTES = 5_000_000  # maximum of postgres.log; the part before is kept in postgres.log.old
SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "autovacuum_naptime": "2s",  # a claim has to skip the dead rows of claims since the last vacuum
    "unix_socket_permissions": "0700",
}


def launch(folder: Path, lock: int) -> None:
    """Run the server until its last user has ended. `lock`: the descriptor of `launcher`, locked by the caller."""
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGTERM,
    ):  # these are for the users; the launcher ends after them
        signal.signal(number, lambda *_: None)
    users, data = open_in(folder, "users"), folder / "data"
    command = user_prefix(folder, data)
    if not data.exists():
        _initdb(folder, data, command, lock)
    socket = _make_socket_folder(folder)
    for stale in (data / "postmaster.pid", socket / f".s.PGSQL.{PORT}.lock"):
        stale.unlink(missing_ok=True)  # another process may have the process ids in them now
    server = subprocess.Popen(
        [*command, str(binaries(data) / "postgres"), "-D", str(data), "-k", str(socket), "-p", str(PORT)],
        pass_fds=(lock,),
        preexec_fn=parent_bound(signal.SIGINT),
    )
    log = folder / "postgres.log"
    unused = False
    while server.poll() is None and not (unused := flock(users, fcntl.LOCK_EX)):
        if log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.old"))
            os.truncate(log, 0)
        time.sleep(0.2)
    for number, seconds in ((signal.SIGINT, 30), (signal.SIGQUIT, 5), (signal.SIGKILL, 5)):
        server.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(seconds)
            break
    if unused and socket != folder:  # otherwise keep it: users have its path, and a new server will use it
        shutil.rmtree(socket, ignore_errors=True)


def _initdb(folder: Path, data: Path, command: list[str], lock: int) -> None:
    new = folder / "data.new"  # renamed to `data` at the end, so that an interrupted run leaves no incomplete `data`
    shutil.rmtree(new, ignore_errors=True)
    options = ["--username", USER, "--encoding=UTF8", "--locale=C", "--data-checksums"]
    options += ["--auth-local=trust", "--auth-host=reject"]
    command = [*command, str(binaries() / "initdb"), "--pgdata", str(new), *options]
    if subprocess.run(command, pass_fds=(lock,), preexec_fn=parent_bound(signal.SIGKILL), check=False).returncode:
        raise SystemExit(1)
    with (new / "postgresql.conf").open("a") as settings:  # initdb takes settings only since PostgreSQL 16
        settings.writelines(f"{name} = '{value}'\n" for name, value in SETTINGS.items())
    new.rename(data)


def _make_socket_folder(folder: Path) -> Path:
    try:
        return socket_folder(folder)
    except OSError:
        short = tempfile.mkdtemp(prefix="loom-", dir="/tmp")  # not in TMPDIR, whose path may be as long
        if os.geteuid() == 0:
            os.chown(short, folder.stat().st_uid, folder.stat().st_gid)
        (folder / "socket").unlink(missing_ok=True)
        (folder / "socket").symlink_to(short)
        return Path(short)


if __name__ == "__main__":
    launch(Path(sys.argv[1]), int(sys.argv[2]))
