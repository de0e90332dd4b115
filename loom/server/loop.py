"""Accepts connections and runs their requests: several threads wait for the events of one epoll.

The thread that gets an event reads the request, runs it and sends the response. So no request is handed from one thread
to another, which took more time than the request itself. A connection that waits for anything but the application costs
no thread: for the rest of a request, for a client that reads slowly, for the result of a Wait. Each has a deadline.

While all threads are busy, the worker's main thread takes the events: it answers /health/live itself, and queues other
requests for the next free thread.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from gunicorn.http import wsgi
from gunicorn.http.errors import ParseException
from gunicorn.http.message import Request

from loom import errors
from loom.http.pollers import CAN_PARK, PARKED, RECEIVED
from loom.http.request_log import abandoned
from loom.server.connection import BUFFERED_BYTES, LINGER_SECONDS, STOP_SECONDS, WRITE_SECONDS, Connection, Output, Run
from loom.server.invalid import refusal
from loom.server.parking import park

log = logging.getLogger("loom.worker")

ALIVE_PATH = "/health/live"
ACCEPTED_AT_ONCE = 64


class Loop:
    """The connections of one worker. Its main thread calls `take_events`, `expire` and `stop`."""

    def __init__(self, application: Any, cfg: Any, listeners: list[Any], wake_main: Callable[[], None]) -> None:
        """`application`: WSGI; `cfg`: gunicorn's settings; `wake_main` ends the main thread's sleep."""
        self._application, self._cfg, self._wake_main = application, cfg, wake_main
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._paused: list[int] = []  # listeners from which nothing is accepted at the moment
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}  # by file descriptor
        self._accept_lock = threading.Lock()  # of _listeners, _paused and _accepting
        self._accepting = True
        self._lock = threading.Lock()  # of all below
        self._armed: dict[Connection, int] = {}  # those that belong to no thread, each with the number of its arming
        self._armings = 0
        self._busy = 0
        self._queue: deque[tuple[Connection, Request]] = deque()  # empty unless all threads are busy
        self._stopping = False
        self.main_sleeps = False
        self.served = 0

    def start(self) -> None:
        for number in range(self._cfg.threads):
            threading.Thread(target=self._work, name=f"request-{number}", daemon=True).start()
        for fd, listener in self._listeners.items():
            listener.setblocking(False)
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)

    @property
    def all_busy(self) -> bool:
        return self._busy >= self._cfg.threads

    @property
    def is_empty(self) -> bool:
        return not self._connections

    # The threads

    def _work(self) -> None:
        while True:
            for fd, _ in self._epoll.poll(maxevents=1):
                with self._lock:
                    self._busy += 1
                if self.all_busy and self.main_sleeps:
                    self._wake_main()
                self._handle(fd, self._run)
                while (queued := self._next_queued()) is not None:
                    self._guarded(partial(self._run_and_proceed, queued[1]), queued[0], self._run)

    def _next_queued(self) -> tuple[Connection, Request] | None:
        """The next request of the queue; if it is empty, the thread is no longer busy."""
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._busy -= 1
            return None

    def take_events(self) -> None:
        """While all threads are busy: read requests, answer /health/live, queue the others."""
        for fd, _ in self._epoll.poll(0, ACCEPTED_AT_ONCE):
            self._handle(fd, self._run_or_queue)

    def _run_or_queue(self, connection: Connection, request: Request) -> bool:
        if request.path == ALIVE_PATH and request.method in ("GET", "HEAD"):
            return self._run(connection, request)
        with self._lock:
            if self.all_busy:
                self._queue.append((connection, request))
                return False
        self.run_soon(connection, request)
        return False

    def run_soon(self, connection: Connection, request: Request) -> None:
        """Lets the next free thread run the request: a connection can almost always be written to."""
        self.arm(connection, select.EPOLLOUT, partial(self._run_and_proceed, request), float("inf"), self.close)

    # Connections

    def _handle(self, fd: int, run: Run) -> None:
        listener = self._listeners.get(fd)
        if listener is not None:
            self._accept_all(fd, listener)
            return
        connection = self._connections.get(fd)
        if connection is not None and self.own(connection):
            self._guarded(connection.on_event, connection, run)

    def own(self, connection: Connection, arming: int | None = None) -> bool:
        """Takes a connection that belongs to no thread. False if another thread was quicker, even if the connection is
        armed again by now (unless `arming` is None)."""
        with self._lock:
            if connection not in self._armed or arming not in (None, self._armed[connection]):
                return False
            del self._armed[connection]
            return True

    def _waiting(self, which: Callable[[Connection], bool]) -> list[tuple[Connection, int]]:
        """The armed connections for which `which` is true, with the number of their arming."""
        with self._lock:
            armed = list(self._armed.items())
        return [(connection, arming) for connection, arming in armed if which(connection)]

    def _guarded(self, step: Callable[..., None], connection: Connection, *args: Any) -> None:
        """Runs a step of a connection that this thread owns; closes it if that fails."""
        try:
            step(connection, *args)
        except (EOFError, OSError):  # the client is gone
            self.close(connection)
        except BaseException:
            self.close(connection)
            log.exception("connection-failed")

    def arm(
        self,
        connection: Connection,
        events: int,
        on_event: Callable[[Connection, Run], None],
        deadline: float,
        on_deadline: Callable[[Connection], None],
    ) -> int:
        """Gives the connection up until one of the events, or until the deadline. Returns the number of this arming."""
        connection.on_event, connection.deadline, connection.on_deadline = on_event, deadline, on_deadline
        with self._lock:
            self._armings += 1
            arming = self._armed[connection] = self._armings
        # Whoever pops it in between modifies it again, at most a little early or late.
        with contextlib.suppress(OSError):
            self._epoll.modify(connection.fd, events | select.EPOLLONESHOT)
        return arming

    def _accept_all(self, fd: int, listener: Any) -> None:
        with self._accept_lock:
            if not self._accepting:
                return
            paused = False
            try:
                for _ in range(ACCEPTED_AT_ONCE):
                    if len(self._connections) >= self._cfg.worker_connections and not self._close_an_idle_one():
                        paused = True
                        break
                    if not self.accept(listener):
                        break
            except OSError:  # too many open files, for example
                paused = True
            if paused:
                self._paused.append(fd)
            else:
                self._epoll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def accept(self, listener: Any) -> bool:
        """Accepts a connection; false if there is none. Raises OSError."""
        try:
            sock, client = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        connection = Connection(sock, client, listener.getsockname(), self._cfg)
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, 0)
        self._await_request(connection)
        return True

    def _close_an_idle_one(self) -> bool:
        for connection, arming in self._waiting(lambda c: c.idle and c.on_event == self._read):
            if self.own(connection, arming):
                self.close(connection)
                return True
        return False

    def _await_request(self, connection: Connection) -> None:
        if not connection.idle:
            too_slow = partial(self._refuse, exc=errors.Stalled())
            self.arm(connection, select.EPOLLIN, self._read, connection.read_deadline, too_slow)
        else:
            deadline = time.monotonic() + (STOP_SECONDS if self._stopping else self._cfg.keepalive)
            self.arm(connection, select.EPOLLIN, self._read, deadline, self.close)

    def _read(self, connection: Connection, run: Run) -> None:
        connection.receive()
        self._proceed(connection, run)

    def _proceed(self, connection: Connection, run: Run) -> None:
        """Runs the requests that have arrived, then awaits the next one."""
        try:
            while (request := connection.next_request()) is not None:
                if not run(connection, request):
                    return
        except (ParseException, ValueError) as exc:
            self._refuse(connection, exc)
            return
        self._await_request(connection)
        self._bound_memory(connection)

    def _run_and_proceed(self, request: Request, connection: Connection, run: Run) -> None:
        if run(connection, request):
            self._proceed(connection, run)

    def _run(self, connection: Connection, request: Request) -> bool:
        """Runs the request and sends the response; true if the next request may follow at once."""
        self.served += 1
        output, environ, has_waited = Output(connection), connection.environ, connection.environ is not None
        if environ is None:
            response, environ = wsgi.create(request, output, connection.client, connection.server, self._cfg)
            environ |= {"wsgi.multithread": True, "gunicorn.socket": connection.sock, CAN_PARK: True}
        else:
            response, connection.environ = wsgi.Response(request, output, self._cfg), None
            environ["wsgi.input"].seek(0)
        if not has_waited:  # many may be woken at once; the time for their answers begins when they are run
            environ[RECEIVED] = connection.ready_at
        # After a second in the queue the client may have given up, and nobody would read the response.
        if (has_waited or time.monotonic() - connection.ready_at > 1) and abandoned(environ):
            self.close(connection)
            return False
        if self._stopping:
            response.force_close()
        chunks: Iterable[bytes] = ()
        try:
            chunks = self._application(environ, response.start_response)
            if PARKED in environ:
                park(self, connection, request, environ)
                return False
            for chunk in chunks:
                response.write(chunk)
            response.close()
            output.flush()
        except (ConnectionError, TimeoutError):
            raise
        except BaseException:
            about = {"method": request.method, "path": request.path, "request_id": environ.get("HTTP_X_REQUEST_ID")}
            log.exception("request-failed", extra={"fields": about})
            if response.headers_sent:
                self.close(connection)
            else:
                self._refuse(connection, errors.Error(), environ)
            return False
        finally:
            getattr(chunks, "close", lambda: None)()
        return self._finish(connection, not response.should_close(), time.monotonic() + WRITE_SECONDS)

    def _finish(self, connection: Connection, keep: bool, deadline: float) -> bool:
        """Sends what is left of the response. True if the connection is kept and the next request may follow."""
        if not connection.send_rest():
            self.arm(connection, select.EPOLLOUT, partial(self._send_more, keep, deadline), deadline, self.close)
            self._bound_memory(connection)
            return False
        if not keep:
            self._linger(connection)
        return keep

    def _send_more(self, keep: bool, deadline: float, connection: Connection, run: Run) -> None:
        if self._finish(connection, keep, deadline):
            self._proceed(connection, run)

    def _refuse(self, connection: Connection, exc: Exception, environ: dict[str, Any] | None = None) -> None:
        """Answers a request that the application does not get to see, or has failed to answer; then closes."""
        connection.unsent = [memoryview(refusal(exc, connection.request, connection.began, environ))]
        self._finish(connection, False, time.monotonic() + WRITE_SECONDS)

    def _linger(self, connection: Connection) -> None:
        """Closes our side, and the connection when the client has closed its side, or after LINGER_SECONDS."""
        connection.sock.shutdown(socket.SHUT_WR)
        self.arm(connection, select.EPOLLIN, self._discard, time.monotonic() + LINGER_SECONDS, self.close)

    def _discard(self, connection: Connection, run: Run) -> None:
        connection.discard_input()
        self.arm(connection, select.EPOLLIN, self._discard, connection.deadline, self.close)

    def close(self, connection: Connection) -> None:
        if self._connections.get(connection.fd) is connection:  # else it is closed, and another one has its number
            del self._connections[connection.fd]
            connection.sock.close()

    def _bound_memory(self, connection: Connection) -> None:
        """Closes slow connections, the slowest first, while all together keep more than BUFFERED_BYTES."""
        if not connection.keeps_much:
            return
        slow = sorted(self._waiting(lambda c: c.keeps_much), key=lambda pair: pair[0].deadline)
        total = sum(c.buffered for c, _ in slow)
        for victim, arming in slow:
            if total <= BUFFERED_BYTES:
                break
            total -= victim.buffered
            if self.own(victim, arming):
                self.close(victim)

    # The main thread

    def expire(self) -> None:
        """Ends what is past its deadline, and accepts again where that was paused."""
        now = time.monotonic()
        for connection, arming in self._waiting(lambda c: c.deadline < now):
            if self.own(connection, arming):
                self._guarded(connection.on_deadline, connection)
        with self._accept_lock:
            while self._paused and self._accepting and len(self._connections) < self._cfg.worker_connections:
                self._epoll.modify(self._paused.pop(), select.EPOLLIN | select.EPOLLONESHOT)

    def stop_accepting(self) -> list[Any]:
        """Returns the listeners, which the caller closes."""
        with self._accept_lock:  # no thread accepts any longer
            self._accepting = False
            listeners, self._listeners = list(self._listeners.values()), {}
        for listener in listeners:
            self._epoll.unregister(listener.fileno())
        return listeners

    def stop(self, idle_seconds: float = STOP_SECONDS) -> None:
        """Ends each connection after its current request, idle ones within `idle_seconds`."""
        self._stopping = True
        for connection, _ in self._waiting(lambda c: c.idle and c.environ is None):
            connection.deadline = min(connection.deadline, time.monotonic() + idle_seconds)
