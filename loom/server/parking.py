"""Requests that wait: each keeps its connection, and no thread."""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, Any

from gunicorn.http.message import Request

from loom.http.pollers import PARKED, Wait
from loom.http.request_log import abandoned
from loom.server.connection import Connection, Run

if TYPE_CHECKING:
    from loom.server.loop import Loop


def park(loop: Loop, connection: Connection, request: Request, environ: dict[str, Any]) -> None:
    """Keeps a request until its Wait is over; then it is run again. If its client hangs up, it is forgotten."""
    wait: Wait = environ.pop(PARKED)
    connection.environ = environ

    def run_again(connection: Connection) -> None:
        connection.ready_at, connection.on_close = time.monotonic(), None
        loop.run_soon(connection, request)

    is_finished = False

    def finished() -> None:
        nonlocal is_finished
        is_finished = True
        if loop.own(connection, step=on_hang_up):
            run_again(connection)

    def keep(events: int) -> None:
        """Arms the connection. The wait may have ended while it was not armed, and finished() could not take it."""
        loop.arm(connection, events, on_hang_up, wait.waiter.ends, on_timeout)
        if is_finished:
            finished()

    def on_hang_up(connection: Connection, run: Run) -> None:
        if abandoned(environ):
            loop.close(connection)
        else:
            # The client sent more before it closed its side, and may still read. EPOLLRDHUP would fire again at once.
            keep(0 if connection.has_input() else select.EPOLLRDHUP)

    def on_timeout(connection: Connection) -> None:
        wait.poller.remove(wait.waiter)
        run_again(connection)

    # Added first: once the connection is armed, it may be closed at any time, which removes the waiter.
    wait.waiter.on_finish = finished
    connection.on_close = lambda: wait.poller.remove(wait.waiter)
    if not wait.poller.add(wait.waiter):
        is_finished = True
    keep(select.EPOLLRDHUP)
