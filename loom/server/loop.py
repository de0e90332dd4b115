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
from loom.bounds import bounds
from loom.http.pollers import CAN_PARK, PARKED, RECEIVED
from loom.http.request_log import abandoned
from loom.server.connection import LINGER_SECONDS, READ_SECONDS, STOP_SECONDS, WRITE_SECONDS, Connection, Output, Run
from loom.server.invalid import refusal
from loom.server.listener import Listeners
from loom.server.parking import park

log = logging.getLogger("loom.worker")

ALIVE_PATH = "/health/live"
EVENTS_AT_ONCE = 64  # that the main thread handles in one call
CLOSED_AT_ONCE = 64  # idle connections that are closed to make room
SMALL_BYTES = 4096  # a connection that keeps less is not closed to save memory


class Loop:
    """The connections of one worker. Its main thread calls `take_events`, `expire` and `stop`."""

    def __init__(self, application: Any, cfg: Any, listeners: list[Any], wake_main: Callable[[], None]) -> None:
        """`application`: WSGI; `cfg`: gunicorn's settings; `wake_main` ends the main thread's sleep."""
        self._application, self._cfg, self._wake_main = application, cfg, wake_main
        self._epoll = select.epoll()
        self.listeners = Listeners(self, self._epoll, listeners)
        self._connections: dict[int, Connection] = {}  # by file descriptor
        self._lock = threading.Lock()  # protects _armed, _armings, _buffered, _busy and _queue
        self._armed: dict[Connection, int] = {}  # those that belong to no thread, each with the number of its arming
        self._armings = 0  # generation counter: the number of the latest arming
        self._buffered = 0  # bytes that all connections keep in memory
        self._busy = 0
        self._queue: deque[tuple[Connection, Request]] = deque()  # empty unless all threads are busy
        self._stopping = False
        self._idle_end = float("inf")
        self.main_sleeps = False
        self.served = 0

    def start(self) -> None:
        for number in range(self._cfg.threads):
            threading.Thread(target=self._work, name=f"request-{number}", daemon=True).start()
        self.listeners.start()

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
        for fd, _ in self._epoll.poll(0, EVENTS_AT_ONCE):
            self._handle(fd, self._run_or_queue)

    def _run_or_queue(self, connection: Connection, request: Request) -> bool:
        if request.path == ALIVE_PATH and request.method in ("GET", "HEAD"):
            return self._run(connection, request)
        self._count(connection)
        with self._lock:
            must_wait, has_room = self.all_busy, self._buffered <= bounds.buffered
            if must_wait and has_room:
                self._queue.append((connection, request))
                return False
        if must_wait:
            self._refuse(connection, errors.Busy("Too many requests wait for this instance."))
            return False
        self.run_soon(connection, request)
        return False

    def run_soon(self, connection: Connection, request: Request) -> None:
        """Lets the next free thread run the request: a connection can almost always be written to."""
        deadline = time.monotonic() + WRITE_SECONDS
        self.arm(connection, select.EPOLLOUT, partial(self._run_and_proceed, request), deadline, self.close)

    # Connections

    def _handle(self, fd: int, run: Run) -> None:
        if self.listeners.handle(fd):
            return
        connection = self._connections.get(fd)
        if connection is not None and self.own(connection):
            self._guarded(connection.on_event, connection, run)

    def own(self, connection: Connection, arming: int | None = None, step: Callable[..., None] | None = None) -> bool:
        """Takes a connection that belongs to no thread. False if another thread has taken it.

        It may have been armed again since: `arming` or `step` say by which call of arm() or for which step it must be.
        """
        with self._lock:
            if connection not in self._armed or arming not in (None, self._armed[connection]):
                return False
            if step is not None and connection.on_event is not step:
                return False
            del self._armed[connection]
            return True

    def _count(self, connection: Connection) -> None:
        """Adds what the connection keeps in memory now to the total."""
        now = connection.buffered
        with self._lock:
            self._buffered += now - connection.accounted_bytes
        connection.accounted_bytes = now

    def _armed_where(self, which: Callable[[Connection], bool]) -> list[tuple[Connection, int]]:
        """The armed connections for which `which` is true, each with the number of its arming."""
        with self._lock:
            armed = list(self._armed.items())
        return [(connection, arming) for connection, arming in armed if which(connection)]

    def _guarded(self, step: Callable[..., None], connection: Connection, *args: Any) -> None:
        """Runs a step of a connection that this thread owns; closes it if that fails."""
        try:
            step(connection, *args)
        except (EOFError, OSError):  # the client is gone
            self.close(connection)
        except Exception:
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
        """Returns the connection to the loop until an event or the deadline; the result is the number of the arming."""
        connection.on_event, connection.deadline, connection.on_deadline = on_event, deadline, on_deadline
        self._count(connection)
        with self._lock:
            self._armings += 1
            arming = self._armed[connection] = self._armings
        # Another thread may take the connection and arm it again before this call. Then the event mask is stale, and
        # the next step runs a little early or late, which is harmless.
        with contextlib.suppress(OSError):
            self._epoll.modify(connection.fd, events | select.EPOLLONESHOT)
        return arming

    def add(self, sock: socket.socket, client: Any, server: Any) -> None:
        """Serves a new connection."""
        connection = Connection(sock, client, server, self._cfg)
        self._epoll.register(connection.fd, 0)
        self._connections[connection.fd] = connection
        self._await_request(connection)

    def make_room(self) -> bool:
        """Closes some idle connections, the oldest first, if there are too many. True if another may be accepted."""
        if len(self._connections) < self._cfg.worker_connections:
            return True
        idle = self._armed_where(self._is_idle)[:CLOSED_AT_ONCE]
        for connection, arming in idle:
            if self.own(connection, arming):
                self.close(connection)
        return bool(idle)

    def _is_idle(self, connection: Connection) -> bool:
        return connection.idle and connection.on_event == self._read

    def _await_request(self, connection: Connection) -> None:
        if not connection.idle:
            too_slow = partial(self._refuse, exc=errors.Stalled())
            self.arm(connection, select.EPOLLIN, self._read, connection.read_deadline, too_slow)
        else:
            self.arm(connection, select.EPOLLIN, self._read, time.monotonic() + self._cfg.keepalive, self.close)

    def _read(self, connection: Connection, run: Run) -> None:
        connection.receive()
        self._proceed(connection, run)

    def _proceed(self, connection: Connection, run: Run) -> None:
        """Runs the requests that have arrived, then awaits the next one."""
        try:
            while (request := connection.next_request()) is not None:
                if not run(connection, request):
                    return
                connection.body_bytes, connection.read_deadline = 0, time.monotonic() + READ_SECONDS
        except (ParseException, ValueError) as exc:
            self._refuse(connection, exc)
            return
        self._await_request(connection)
        self._bound_memory()

    def _run_and_proceed(self, request: Request, connection: Connection, run: Run) -> None:
        if run(connection, request):
            connection.body_bytes, connection.read_deadline = 0, time.monotonic() + READ_SECONDS
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
                self._bound_memory()
                return False
            for chunk in chunks:
                response.write(chunk)
            response.close()
            output.flush()
        except (ConnectionError, TimeoutError):
            raise
        except (Exception, SystemExit):
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
        connection.body_bytes = 0
        if not connection.send_rest():
            self.arm(connection, select.EPOLLOUT, partial(self._send_more, keep, deadline), deadline, self.close)
            self._bound_memory()
            return False
        if not keep:
            self._linger(connection)
        return keep

    def _send_more(self, keep: bool, deadline: float, connection: Connection, run: Run) -> None:
        if self._finish(connection, keep, deadline):
            connection.read_deadline = time.monotonic() + READ_SECONDS
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
        if self._connections.get(connection.fd) is not connection:  # it is closed, and another one has its number
            return
        del self._connections[connection.fd]
        connection.sock.close()
        with self._lock:
            self._buffered -= connection.accounted_bytes
        if connection.on_close is not None:
            connection.on_close()

    def _bound_memory(self) -> None:
        """While the total exceeds the bound, closes connections that keep much memory, earliest deadline first."""
        if self._buffered <= bounds.buffered:
            return
        slow = self._armed_where(lambda c: c.accounted_bytes > SMALL_BYTES)
        for victim, arming in sorted(slow, key=lambda pair: pair[0].deadline):
            if self._buffered <= bounds.buffered:
                break
            if self.own(victim, arming):
                self.close(victim)

    # The main thread

    def expire(self) -> None:
        """Ends what is past its deadline, and accepts again where that was paused."""
        now = time.monotonic()
        end_idle = now > self._idle_end
        for connection, arming in self._armed_where(lambda c: c.deadline < now or (end_idle and self._is_idle(c))):
            if self.own(connection, arming):
                self._guarded(connection.on_deadline, connection)
        self.listeners.resume()

    def stop(self, idle_seconds: float = STOP_SECONDS) -> None:
        """Ends each connection after its current request, idle ones after `idle_seconds`."""
        self._stopping = True
        self._idle_end = time.monotonic() + idle_seconds
