"""The gunicorn worker: gthread, with an exit that loses no request and answers that leave in one send."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import Any

from gunicorn import glogging
from gunicorn.errors import HaltServer
from gunicorn.workers import gthread

from loom import instances
from loom.http.waiting import client_gone
from loom.server import check
from loom.server.listener import close_empty

log = logging.getLogger("loom.worker")

FAILURES = 3  # in a row: so many new workers that could not serve end the master
QUIT_SECONDS = 5  # Ctrl-C: from the signal to the end of the process, at most
STALL_SECONDS = 15  # for the next bytes of a request, then its thread is free again; below a worker's graceful_timeout
JOINED_BYTES = 64 * 1024  # of a body that are copied behind its headers; the rest follows uncopied

# What ends a worker would be lost in the copies of its master's handlers with which it is born: these signals wait from
# before its fork until it has its own; in the master only while it forks. Threads that it starts meanwhile leave them
# to the main one.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
os.register_at_fork(after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, ENDING))

# In memory that the master shares with its workers: how many new ones in a row could not serve (one byte), and why the
# last one could not. Two that fail at the same moment may count as one; then one more is tried.
_failed = mmap.mmap(-1, 512)


def _threads() -> int:
    """How many threads this process has; those that Python does not know included, where that can be told."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


class OneSend:
    """A socket whose first `sendall` is held back for the second: headers and body leave together.

    A worker killed between the two cuts an answer short that nginx, having seen its headers, can't ask for again.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.held: bytes | None = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def sendall(self, data: bytes) -> None:
        if self.held is None:
            self.sock.sendall(data)
        elif not self.held:
            self.held = data
        else:
            head, self.held = self.held, None
            self.sock.sendall(head + data[:JOINED_BYTES])
            if len(data) > JOINED_BYTES:
                self.sock.sendall(memoryview(data)[JOINED_BYTES:])

    def sendfile(self, *args: Any, **kwargs: Any) -> int:
        self.flush()
        return self.sock.sendfile(*args, **kwargs)

    def flush(self) -> None:
        """Send what is held: an answer without a body."""
        held, self.held = self.held, None
        if held:
            self.sock.sendall(held)


class Logger(glogging.Logger):
    """gunicorn's log without its access lines: with a logging configuration it builds one per request (10 us)."""

    def access(self, *args: Any, **kwargs: Any) -> None:
        pass

    def exception(self, *args: Any, **kwargs: Any) -> None:
        """Not for a client that stalls, which is no fault of ours."""
        if not isinstance(sys.exc_info()[1], BlockingIOError):
            super().exception(*args, **kwargs)


class Worker(gthread.ThreadWorker):
    """Leaves without resetting a connection: stops accepting only once the listener is empty, then closes it.

    The stock worker leaves its listener open while it drains; what the kernel accepts meanwhile is reset.
    """

    drain_seconds = 0.0  # how long to go on accepting, told as not ready, after SIGTERM
    drain_until: float | None = None
    quitting = False

    def before_fork(self) -> None:
        """In the master; the last thing before the fork. Ends gunicorn when no worker can serve."""
        if _failed[0] >= FAILURES:
            reason = _failed[1:].rstrip(b"\0").decode(errors="replace")
            raise HaltServer(f"{_failed[0]} workers in a row could not serve: {reason}", instances.BOOT_ERROR)
        threads = _threads()
        if threads > 1:  # what the others are doing would stay half done in the worker
            names = [thread.name for thread in threading.enumerate()]
            log.error("master-has-threads", extra={"fields": {"count": threads, "names": names}})
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    def check_serving(self) -> None:
        """post_worker_init: leave, to be replaced, when our own application does not answer."""
        problem = check.problem(self.wsgi)
        if problem is None:
            _failed[0] = 0
            return
        _failed[0] = min(_failed[0] + 1, FAILURES)
        reason = f"GET {check.PATH}: {problem!r}"
        _failed[1:] = reason.encode()[: len(_failed) - 1].ljust(len(_failed) - 1, b"\0")
        exception = problem if isinstance(problem, BaseException) else None
        log.critical("cannot-serve", exc_info=exception, extra={"fields": {"reason": reason}})
        sys.exit(1)

    def init_signals(self) -> None:
        super().init_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: say that we drain, then stop after `drain_seconds`; a second SIGTERM does not wait for them."""
        instances.draining()
        if self.drain_seconds and self.drain_until is None:
            self.drain_until = time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT, SIGQUIT: a drain of a second. A request or a database that takes longer is cut by the alarm."""
        if self.quitting:  # Ctrl-C arrives twice: from the terminal and from our master
            return
        self.quitting = True
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, QUIT_SECONDS)
        if not self.alive:
            super().handle_quit(sig, frame)
        self.cfg.set("graceful_timeout", 1)
        super().handle_exit(sig, frame)

    def notify(self) -> None:
        super().notify()
        if self.drain_until is not None and time.monotonic() >= self.drain_until:
            super().handle_exit(signal.SIGTERM, None)

    def is_parent_alive(self) -> bool:
        if not super().is_parent_alive():
            self.alive = False
        return self.alive

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled and self.alive)
        if self.alive:
            return
        instances.draining()
        while self.sockets:
            listener = self.sockets.pop()
            close_empty(listener, self.ppid, partial(self._take, listener))

    def _take(self, listener: Any) -> bool:
        seen = self.nr_conns
        self.accept(listener)
        return self.nr_conns != seen

    def _cap_keepalive(self, deadline: float) -> None:
        """Also for connections that never sent a request: stock waits for them until `graceful_timeout`."""
        deadline = time.monotonic() if self.quitting else deadline
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:
            conn.timeout = min(conn.timeout, deadline)

    def enqueue_req(self, conn: gthread.TConn) -> None:
        conn.queued_at = time.monotonic()
        if not conn.initialized:
            conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", STALL_SECONDS, 0))
        super().enqueue_req(conn)

    def handle_request(self, req: Any, conn: gthread.TConn) -> bool:
        sock, conn.sock = conn.sock, OneSend(conn.sock)
        try:
            # Who waited for a thread may have given up meanwhile; the work would be for nobody.
            if time.monotonic() - conn.queued_at > 1 and client_gone({"gunicorn.socket": sock}):
                return False
            keep = super().handle_request(req, conn)
            conn.sock.flush()
            return keep
        finally:
            conn.sock = sock

    def finish_request(self, conn: gthread.TConn, fs: Future[Any]) -> None:
        """Closes on a thread: the graceful close may wait 2 s for the client, and this loop accepts."""
        if fs.cancelled() or fs.exception() or fs.result():
            super().finish_request(conn, fs)
        else:
            self.nr_conns -= 1
            with contextlib.suppress(OSError):
                conn.sock.shutdown(socket.SHUT_WR)  # now: a client may read until the end
            self.tpool.submit(conn.close, graceful=True)
