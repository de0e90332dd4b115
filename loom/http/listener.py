"""Closing a listening socket without resetting a connection that the kernel has already accepted for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import sys
from collections.abc import Callable

SO_ATTACH_FILTER = 26  # Linux; the socket module has no name for it
# Classic BPF on the TCP header: byte 13 has the flags, 2 is SYN; drop those, take everything else.
DROP_SYN = b"".join(
    struct.pack("HBBI", *op) for op in ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 1 << 18))
)
HANDSHAKE_SECONDS = 0.005  # how long a handshake under way may take to end; the network between nginx and us


def close_empty(listener: socket.socket, parent: int, accept: Callable[[], bool]) -> None:
    """Call `accept` (true when it took a connection) until none is left, then close `listener`.

    A connection completed between the last accept and the close would be reset with its request on it.
    So new ones are first kept from starting: their SYN is dropped, the client sends it again after a second,
    and is refused then, which nginx answers by asking another instance. A listener that `parent` (a pid)
    holds open too needs none of this, and must not get it: others serve what is queued on it.
    """
    if sys.platform == "linux" and not _held_by(parent, listener):
        program = ctypes.create_string_buffer(DROP_SYN)
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 4, ctypes.addressof(program)))
    while accept() or select.select([listener], [], [], HANDSHAKE_SECONDS)[0]:
        pass
    listener.close()


def _held_by(pid: int, listener: socket.socket) -> bool:
    """Whether process `pid` has `listener` open; true when it can't be told."""
    try:
        inode = f"socket:[{os.fstat(listener.fileno()).st_ino}]"
        return any(os.readlink(entry.path) == inode for entry in os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return True
