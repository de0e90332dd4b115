"""Closing a listening socket without resetting a connection that the kernel has already accepted for it."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import sys
from collections.abc import Callable

SO_ATTACH_FILTER = 26  # Linux; the socket module has no name for it
# Classic BPF over the TCP header: byte 13 holds the flags, and SYN is 2. Drop what has it, take everything else.
DROP_SYN = b"".join(
    struct.pack("HBBI", *step) for step in ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 1 << 18))
)
HANDSHAKE_SECONDS = 0.005  # for a handshake under way to end: more than a round trip between nginx and us


def close_empty(listener: socket.socket, parent: int, accept: Callable[[], bool]) -> None:
    """Call `accept` (true when it took a connection) until none is left, then close `listener`.

    A connection that comes between the last accept and the close would be reset with its request on it: seen 8
    times in 151 closes under load. So none may begin any more: its SYN is dropped, and when the client repeats
    it, a second later, it is refused, which nginx answers by asking another instance. Not on a listener that
    `parent` (a process number) holds open: what is queued there is served by others, who want more of it.
    """
    quiet = HANDSHAKE_SECONDS if not _held_by(parent, listener) and _drop_new(listener) else 0.0
    while accept() or select.select([listener], [], [], quiet)[0]:
        pass
    listener.close()


def _held_by(pid: int, listener: socket.socket) -> bool:
    """Whether process `pid` has `listener` open; true when it can't be told."""
    inode = f"socket:[{os.fstat(listener.fileno()).st_ino}]"
    try:
        return any(os.readlink(entry.path) == inode for entry in os.scandir(f"/proc/{pid}/fd"))
    except FileNotFoundError:  # a file that it closed meanwhile, if not itself
        return os.path.exists(f"/proc/{pid}")
    except OSError:
        return True


def _drop_new(listener: socket.socket) -> bool:
    """Make the kernel ignore new connections. False where that can't be done."""
    if sys.platform != "linux":
        return False
    program = ctypes.create_string_buffer(DROP_SYN)
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 4, ctypes.addressof(program)))
    except OSError:
        return False
    return True
