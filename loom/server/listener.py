"""Accepting connections, and closing a listening socket without resetting one that the kernel has accepted for it."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loom.server.loop import Loop

ESTABLISHED = 1  # the first byte of Linux's tcp_info
ACCEPTED_AT_ONCE = 64


class Listeners:
    """The listening sockets of a loop. One thread at a time accepts from each."""

    def __init__(self, loop: Loop, epoll: select.epoll, sockets: list[Any]) -> None:
        self._loop, self._epoll = loop, epoll
        self._sockets = {sock.fileno(): sock for sock in sockets}
        self._paused: list[int] = []  # from which nothing is accepted at the moment
        self._lock = threading.Lock()

    def start(self) -> None:
        for fd, sock in self._sockets.items():
            sock.setblocking(False)
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def handle(self, fd: int) -> bool:
        """Accepts what has arrived, if the file descriptor is a listening socket."""
        sock = self._sockets.get(fd)
        if sock is None:
            return False
        with self._lock:
            if fd not in self._sockets:  # it is being closed
                return True
            paused = False
            try:
                for _ in range(ACCEPTED_AT_ONCE):
                    paused = not self._loop.make_room()
                    if paused or not self.accept(sock):
                        break
            except OSError:  # too many open files, for example
                paused = True
            if paused:
                self._paused.append(fd)
            else:
                self._epoll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)
        return True

    def accept(self, sock: Any) -> bool:
        """Accepts a connection; false if there is none. Raises OSError."""
        try:
            client, address = sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        self._loop.add(client, address, sock.getsockname())
        return True

    def resume(self) -> None:
        """Accepts again where that was paused, if there is room."""
        with self._lock:
            while self._paused and self._loop.make_room():
                self._epoll.modify(self._paused.pop(), select.EPOLLIN | select.EPOLLONESHOT)

    def close(self, parent: int) -> None:
        """Accepts what has arrived, and closes the sockets. `parent`: see close_empty()."""
        with self._lock:  # no thread accepts any longer
            sockets, self._sockets, self._paused = self._sockets, {}, []
        for fd, sock in sockets.items():
            self._epoll.unregister(fd)
            close_empty(sock, parent, partial(self.accept, sock))


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
