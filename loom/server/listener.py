"""Closing a listening socket without resetting a connection that the kernel has already accepted for it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

ESTABLISHED = 1  # the first byte of Linux's tcp_info


def close_empty(listener: Any, parent: int, accept: Callable[[], bool]) -> None:
    """Call `accept` (true if it accepted a connection) until none is left, then close gunicorn's `listener`.

    A connection that arrives between the last accept and the close would be reset together with its request (13 of
    113,000 in 104 closes). So the backlog is shortened to one connection, and a connection of our own fills it. From
    then on the kernel drops new connections; a client tries again a second later and is refused, after which nginx
    asks another instance. This is skipped for a listener that `parent` (a process id) also holds open: other workers
    accept its connections.
    """
    plug = socket.socket(listener.FAMILY)
    if sys.platform == "linux" and not _held_by(parent, listener):
        listener.listen(0)
        for _ in range(100):  # sometimes another connection takes the place first
            while accept():
                pass
            plug.close()
            plug = socket.socket(listener.FAMILY)
            plug.setblocking(False)
            plug.connect_ex(listener.getsockname())
            state = plug.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
            if state == ESTABLISHED and listener.get_backlog() == 1:
                break
    else:
        while accept():
            pass
    listener.close()
    plug.close()


def _held_by(pid: int, listener: Any) -> bool:
    """Whether process `pid` has `listener` open; true if that is unknown."""
    inode = f"socket:[{os.fstat(listener.fileno()).st_ino}]"
    try:
        return any(os.readlink(entry.path) == inode for entry in os.scandir(f"/proc/{pid}/fd"))
    except FileNotFoundError:  # it has closed a file in the meantime, or has ended itself
        return os.path.exists(f"/proc/{pid}")
    except OSError:
        return True
