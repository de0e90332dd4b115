"""The requests that wait in this worker.

A view that has nothing to answer yet calls `wait`, which ends this call of the view. The request is run again from the
start when there is a result or the wait is over. Under our own worker it costs no thread in between (loom.server.loop);
under any other server its thread sleeps.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from flask import current_app, request

from loom import instances
from loom.bounds import bounds
from loom.http import auth
from loom.locks.queue import LockPoller
from loom.state.events import EventPoller
from loom.waiting import Poller, Waiter

CAN_PARK = "loom.can_park"  # in the environ: set by a server that can run a request again later
PARKED = "loom.parked"  # the Wait for which the server is to keep the request; there is no response yet
WAITER = "loom.waiter"  # the Waiter with which this request has waited before
RECEIVED = "loom.received"  # time.monotonic() when the request was complete


class Pollers:
    """The pollers of an application.

    Under a server where a request that waits keeps its thread, half of the threads may wait, or all but eight if that
    is more. At most half of these wait for events: a request for a lock has a place in a queue, so it must be able to
    wait.
    """

    def __init__(self, threads: int) -> None:
        self._waiting_threads = max(1, threads - 8, threads // 2)
        self._sleeping = 0
        self._lock = threading.Lock()
        self.locks = LockPoller(bounds.waiting, _draining)
        self.events = EventPoller(bounds.waiting, _draining)

    def full(self, poller: Poller) -> bool:
        """Whether this request may not wait."""
        if request.environ.get(CAN_PARK):
            return poller.full
        most = self._waiting_threads if poller is self.locks else max(1, self._waiting_threads // 2)
        return poller.full or self._sleeping >= most

    def sleep(self, wait: Wait) -> None:
        """Keeps this thread until the wait is over."""
        over = threading.Event()
        wait.waiter.on_finish = over.set
        with self._lock:
            self._sleeping += 1
        try:
            if wait.poller.add(wait.waiter):
                over.wait(max(0.0, wait.waiter.ends - time.monotonic()))
                wait.poller.remove(wait.waiter)
        finally:
            with self._lock:
                self._sleeping -= 1


class Wait(Exception):
    """Raised by a view, through `wait`: run the request again when the waiter has finished."""

    def __init__(self, poller: Poller, waiter: Waiter) -> None:
        self.poller, self.waiter = poller, waiter


def pollers() -> Pollers:
    """The pollers of the application that serves this request."""
    return cast(Any, current_app).pollers


def waited() -> Waiter | None:
    """What this request has waited for before this call of the view."""
    return request.environ.get(WAITER)


def wait(poller: Poller, make_waiter: Callable[[float, Callable[[], bool]], Waiter], seconds: float) -> None:
    """Ends this call of the view, to run the request again later. Returns if the request may not wait (any longer).

    `seconds` count from the first call of the view.
    """
    before = waited()
    if before is not None and before.result is None:  # time is over, the client has hung up, or the worker drains
        return
    ends = time.monotonic() + seconds if before is None else before.ends
    caller = auth.caller()
    if caller.has_key and poller.waiting_of(caller.principal) >= bounds.waiting_of_key:
        return
    if time.monotonic() < ends and not pollers().full(poller):
        waiter = make_waiter(ends, _never if request.environ.get(CAN_PARK) else _client_gone_check())
        waiter.principal = caller.principal if caller.has_key else ""
        raise Wait(poller, waiter)


def before_view() -> None:
    """Raises the error with which the wait of this request has ended, if any."""
    before = waited()
    if before is not None and before.error is not None:
        raise before.error


def _never() -> bool:
    return False


def _client_gone_check() -> Callable[[], bool]:
    environ = request.environ
    return lambda: client_gone(environ)


def client_gone(environ: dict[str, Any]) -> bool:
    """Whether the client of a request has hung up, so that nobody would read the answer. False if that is unknown."""
    sock = environ.get("gunicorn.socket")
    try:
        return sock is not None and sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except ConnectionError:
        return True
    except (OSError, ValueError):  # nothing to read: the client waits; or TLS, whose recv() takes no flags
        return False


def _draining() -> bool:
    return instances.current is not None and instances.current.draining
