"""The syslog server: its address, and the handler that sends it each log line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from loom.log_writer import Handler, Line

log = logging.getLogger("loom.log")

FACILITY_DAEMON = 3 << 3
LOOK_UP_SECONDS = 2.0  # for which setup() waits for the address of the syslog server
LOOK_UP_PERIOD = 60.0  # seconds between two look-ups of that address in a worker
RETRY_PERIOD = 2.0  # seconds, after a look-up that failed

Destination = tuple[int, tuple[Any, ...]]  # an address family, and an address for sendto()

LOOK_UP_ERRORS = (OSError, OverflowError, UnicodeError)  # raised for an address that does not resolve


def look_up(address: str, flags: int = 0) -> Destination:
    """Resolve `host:port`. Raises one of LOOK_UP_ERRORS."""
    host, _, port = address.rpartition(":")
    family, _, _, _, sockaddr = socket.getaddrinfo(host.strip("[]"), int(port), 0, socket.SOCK_DGRAM, 0, flags)[0]
    return family, sockaddr


# The same, for another process, without Loom's code.
_LOOK_UP = """
import json, socket, sys
host, port = sys.argv[1:]
family, _, _, _, sockaddr = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
print(json.dumps([family, sockaddr]))
"""


def look_up_in_process(address: str) -> tuple[Destination | None, str]:
    """Resolve `host:port` within LOOK_UP_SECONDS; return None and the reason if that fails.

    getaddrinfo() can take half a minute if a name server does not answer. It runs in another process, which can be
    killed: a thread would go on, and a gunicorn master must have none (see SyslogHandler).
    """
    with contextlib.suppress(*LOOK_UP_ERRORS):
        return look_up(address, socket.AI_NUMERICHOST), ""
    host, _, port = address.rpartition(":")
    command = [sys.executable, "-I", "-S", "-c", _LOOK_UP, host.strip("[]"), port]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_UP_SECONDS, check=True)
        family, sockaddr = json.loads(run.stdout)
        return (family, tuple(sockaddr)), ""
    except subprocess.TimeoutExpired:
        return None, f"no name server answered within {LOOK_UP_SECONDS:.0f} s"
    except subprocess.CalledProcessError as exc:
        return None, exc.stderr.strip().rpartition("\n")[2]
    except OSError as exc:
        return None, str(exc)


class SyslogHandler(Handler):
    """Sends RFC 5424 lines by UDP, and never waits: a line that cannot be sent at once does not reach the server.

    Only the look-up of the server's address can take long. setup() does it once, and a worker repeats it in a thread.
    A gunicorn master must not have a thread: if it forks while the thread imports a module, for instance, the import
    stays half done in the worker for ever.
    """

    def __init__(self, address: str, destination: Destination | None = None) -> None:
        super().__init__()
        self.address = address
        self.head = f"{socket.gethostname()} loom"
        self.ended = threading.Event()
        self.reported: set[int | None] = set()  # errno of each kind of failure that has been logged
        self.destination: Destination | None = None
        self.send: Callable[[bytes], object] | None = None
        if destination is not None:
            self._send_to(destination)

    def start(self) -> None:
        """Also look up the address from time to time, in another thread."""
        super().start()
        threading.Thread(target=self._follow, name="syslog-address", daemon=True).start()

    def _follow(self) -> None:
        failed = self.destination is None
        while not self.ended.wait(RETRY_PERIOD if failed else LOOK_UP_PERIOD):
            try:
                self._send_to(look_up(self.address))
                failed = False
            except LOOK_UP_ERRORS:  # the last address, if any, stays in use
                failed = True

    def _send_to(self, destination: Destination) -> None:
        if destination != self.destination:
            family, sockaddr = destination
            udp = socket.socket(family, socket.SOCK_DGRAM)
            udp.setblocking(False)
            self.destination, self.send = destination, lambda line: udp.sendto(line, sockaddr)

    def write(self, lines: Sequence[Line], patience: float | None) -> None:
        for line in lines:
            severity = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(line.level, 3)
            when = datetime.fromtimestamp(line.created, timezone.utc).isoformat()
            try:
                if self.send is None:
                    raise OSError("the address of the server is not known")
                text = f"<{FACILITY_DAEMON | severity}>1 {when} {self.head} {os.getpid()} - - {line.text}"
                self.send(text.encode())
            except OSError as exc:
                self.dropped += 1
                self.told += 1  # by this line alone: a further one for each loss would be lost too
                self._report(exc)

    def _report(self, exc: OSError) -> None:
        """Log once for each kind of failure that lines do not reach the syslog server."""
        if exc.errno is not None and exc.errno not in self.reported:
            self.reported.add(exc.errno)
            log.warning("syslog-unreachable", extra={"fields": {"address": self.address, "reason": str(exc)}})

    def close(self) -> None:
        self.ended.set()
        super().close()
