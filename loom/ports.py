"""Checks that a port is free before anything starts, and finds out who has it."""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from loom.dsn import mask


class PortError(Exception):
    """A port is taken or cannot be used; the text is one line."""


def check_free(host: str, port: int, advice: str, wait_seconds: float = 0) -> None:
    """Raise PortError, which ends with `advice`, if nothing can listen on the port. A taken one may become free."""
    deadline = time.monotonic() + wait_seconds
    while (problem := _problem(host, port)) is not None:
        taken = problem.errno == errno.EADDRINUSE
        if not taken or time.monotonic() > deadline:
            what = f"is taken by {_owner(port)}" if taken else f"cannot be used on {host}: {problem.strerror}"
            raise PortError(f"Port {port} {what}. {advice}")
        time.sleep(0.1)


def _problem(host: str, port: int) -> OSError | None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        return exc
    return None


def _owner(port: int) -> str:
    """Return the process that listens on the port, as far as /proc shows it."""
    sockets = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = table.read_text().splitlines()[1:] if table.exists() else []
        for _, local, _, state, *rest in map(str.split, rows):
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{rest[5]}]")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link) in sockets:
                process = link.parents[1]
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"process {process.name} ({mask(command)[:80]})"
    return "a process of another user"
