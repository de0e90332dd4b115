"""The gunicorn worker: gthread, with an exit that loses no request and responses that are sent in one call."""

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

from gunicorn import glogging, util
from gunicorn.errors import HaltServer
from gunicorn.workers import gthread

from loom import instances
from loom.http.pollers import client_gone
from loom.server import check
from loom.server.errors import write_problem
from loom.server.listener import close_empty

log = logging.getLogger("loom.worker")

util.write_error = write_problem

FAILURES = 3  # in a row: after this number of new workers that could not serve, the master ends
QUIT_SECONDS = 5  # after Ctrl-C, the process ends within this time
STALL_SECONDS = (
    15  # to wait for the next bytes of a request before its thread is freed; below a worker's graceful_timeout
)
JOINED_BYTES = 64 * 1024  # of a body that are copied behind the headers into one send; the rest is not copied

# A new worker starts with copies of its master's signal handlers, which would swallow these signals. So these are
# blocked from before the fork until the worker has its own handlers; in the master only during the fork. Threads that
# the worker starts in this time inherit the mask, so that its main thread gets the signals.
TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
os.register_at_fork(after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, TERMINATION_SIGNALS))

# Memory that the master shares with its workers: how many new workers in a row could not serve (one byte), and the
# reason of the last one. Two that fail at the same moment may count as one; then one more is started.
_failed = mmap.mmap(-1, 512)


def _threads() -> int:
    """The number of threads of this process; on Linux including those that Python does not know."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


class OneSend:
    """A socket that keeps the data of the first `sendall` until the second: headers and body are sent together.

    If a worker is killed between the two, nginx has seen the headers and cannot ask another instance for the answer.
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
        """Send the data that is held: the headers of a response without a body."""
        held, self.held = self.held, None
        if held:
            self.sock.sendall(held)


class Logger(glogging.Logger):
    """gunicorn's log without access lines; with a logging configuration it would build one per request (10 us)."""

    def access(self, *args: Any, **kwargs: Any) -> None:
        pass

    def exception(self, *args: Any, **kwargs: Any) -> None:
        """Ignores a client that stalls, which is not an error of ours."""
        if not isinstance(sys.exc_info()[1], BlockingIOError):
            super().exception(*args, **kwargs)


class Worker(gthread.ThreadWorker):
    """Ends without resetting a connection: stops accepting only when the listener is empty, then closes it.

    gunicorn's own worker keeps its listener open while it drains; connections that the kernel accepts then are reset.
    """

    drain_seconds = 0.0  # after SIGTERM: how long to go on accepting, while /health/ready says 503
    drain_until: float | None = None
    quitting = False

    def before_fork(self) -> None:
        """In the master, immediately before the fork. Ends gunicorn if no worker can serve."""
        if _failed[0] >= FAILURES:
            reason = _failed[1:].rstrip(b"\0").decode(errors="replace")
            raise HaltServer(f"{_failed[0]} workers in a row could not serve: {reason}", instances.BOOT_ERROR)
        threads = _threads()
        if threads > 1:  # the work of other threads would stay half done in the worker
            names = [thread.name for thread in threading.enumerate()]
            log.error("master-has-threads", extra={"fields": {"count": threads, "names": names}})
        signal.pthread_sigmask(signal.SIG_BLOCK, TERMINATION_SIGNALS)

    def check_serving(self) -> None:
        """post_worker_init: exit, to be replaced, if our own application does not answer."""
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATION_SIGNALS)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: report that we drain, then stop after `drain_seconds`; a second SIGTERM stops at once."""
        instances.drain()
        if self.drain_seconds and self.drain_until is None:
            self.drain_until = time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT, SIGQUIT: drain for one second. SIGALRM ends the process if a request or the database takes longer."""
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
        instances.drain()
        while self.sockets:
            listener = self.sockets.pop()
            close_empty(listener, self.ppid, partial(self._accept_one, listener))

    def _accept_one(self, listener: Any) -> bool:
        seen = self.nr_conns
        self.accept(listener)
        return self.nr_conns != seen

    def _cap_keepalive(self, deadline: float) -> None:
        """Also for connections that never sent a request; gunicorn waits for these until `graceful_timeout`."""
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
            # After a long wait for a thread the client may have hung up, and nobody would read the response.
            if time.monotonic() - conn.queued_at > 1 and client_gone({"gunicorn.socket": sock}):
                return False
            keep = super().handle_request(req, conn)
            conn.sock.flush()
            return keep
        finally:
            conn.sock = sock

    def finish_request(self, conn: gthread.TConn, fs: Future[Any]) -> None:
        """Closes in a thread: a graceful close may wait 2 s for the client, and this loop must accept connections."""
        if fs.cancelled() or fs.exception() or fs.result():
            super().finish_request(conn, fs)
        else:
            self.nr_conns -= 1
            with contextlib.suppress(OSError):
                conn.sock.shutdown(socket.SHUT_WR)  # at once: a client may read until the end of the stream
            self.tpool.submit(conn.close, graceful=True)
