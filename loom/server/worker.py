"""The gunicorn worker: its start, its signals, and its end."""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import os
import resource
import select
import signal
import sys
import threading
import time
from functools import partial
from typing import Any

from gunicorn import glogging
from gunicorn.errors import HaltServer
from gunicorn.workers import base

from loom import instances
from loom.server import check
from loom.server.connection import STOP_SECONDS
from loom.server.loop import Loop

log = logging.getLogger("loom.worker")

FAILURES = 3  # in a row: after this number of new workers that could not serve, the master ends
QUIT_SECONDS = 5  # after Ctrl-C, the process ends within this time
TURN_SECONDS = 0.25  # of the main thread's sleep: how exactly deadlines are kept
BUSY_TURN_SECONDS = 0.005  # while all threads are busy: how long /health/live may wait
OTHER_FILES = 128  # besides clients' connections: those to the database, logs, pipes

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


class Logger(glogging.Logger):
    """gunicorn's log without access lines; with a logging configuration it would build one per request (10 us)."""

    def access(self, *args: Any, **kwargs: Any) -> None:
        pass


class Worker(base.Worker):
    """Serves requests in threads (see loop.py), and ends without resetting a connection."""

    drain_seconds = 0.0  # after SIGTERM: how long to go on accepting, while /health/ready says 503
    drain_until: float | None = None
    quitting = False
    _next_second = _next_expiry = 0.0
    _was_busy = False

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

    def init_process(self) -> None:
        self._allow_open_files()
        self.cfg.set("sendfile", False)  # the loop sends what the client does not take at once
        super().init_process()

    def _allow_open_files(self) -> None:
        """A limit of 1,024 is common; each connection takes a file descriptor."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.cfg.worker_connections + OTHER_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            self.cfg.set("worker_connections", max(1, min(self.cfg.worker_connections, most - OTHER_FILES)))

    def init_signals(self) -> None:
        super().init_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINATION_SIGNALS)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: report that we drain, then stop after `drain_seconds`; a second SIGTERM stops at once."""
        instances.drain()
        if self.drain_seconds and self.drain_until is None:
            self.drain_until = time.monotonic() + self.drain_seconds
        else:
            self.alive = False

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
        instances.drain()
        self.alive = False

    def handle_abort(self, sig: int, frame: Any) -> None:
        """SIGABRT: the main thread is stuck, and gunicorn gives this worker up. It marks the worker as dead."""
        log.critical("worker-stuck")
        os._exit(1)

    def run(self) -> None:
        # A full collection stops all threads while it looks at every object: with 2,000 waiting requests for 150 ms. So
        # what was loaded is left out, and it comes ten times less often; what a request leaves is collected before.
        gc.collect()
        gc.freeze()
        gc.set_threshold(700, 10, 100)
        self._loop = Loop(self.wsgi, self.cfg, self.sockets, self._wake)
        self._woken = select.poll()  # by a signal or by the loop
        self._woken.register(self.PIPE[0], select.POLLIN)
        self._loop.start()
        while self.alive:
            self._turn()
            if self.drain_until is not None and time.monotonic() >= self.drain_until:
                self.alive = False
            if self.ppid != os.getppid():  # the master is gone
                self.alive = False
            if self._loop.served >= self.max_requests:
                self.alive = False
        instances.drain()
        self._loop.listeners.close(self.ppid)
        self._loop.stop(0 if self.quitting else STOP_SECONDS)
        deadline = time.monotonic() + self.cfg.graceful_timeout
        while not self._loop.is_empty and time.monotonic() < deadline:
            self._turn(longest=0.05)

    def _turn(self, longest: float = TURN_SECONDS) -> None:
        """One turn of the main thread: take events while all threads are busy, else sleep until something happens."""
        now = time.monotonic()
        if now >= self._next_second:
            self._next_second = now + 1
            self.notify()
        if now >= self._next_expiry:
            self._next_expiry = now + TURN_SECONDS
            self._loop.expire()
        if self._loop.all_busy:
            self._loop.take_events()
            self._was_busy = True
            longest = BUSY_TURN_SECONDS
        elif self._was_busy:  # and may be again soon: waking this thread each time would cost more
            self._was_busy = False
            longest = BUSY_TURN_SECONDS
        else:
            self._loop.main_sleeps = True
            if self._loop.all_busy:
                longest = 0
        if self._woken.poll(longest * 1000):
            os.read(self.PIPE[0], 4096)
        self._loop.main_sleeps = False

    def _wake(self) -> None:
        self._loop.main_sleeps = False
        with contextlib.suppress(BlockingIOError):  # full: it is awake
            os.write(self.PIPE[1], b"!")
