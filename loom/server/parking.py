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
        connection.ready_at = time.monotonic()
        loop.run_soon(connection, request)

    arming, is_finished = 0, False

    def finished() -> None:
        nonlocal is_finished
        is_finished = True
        if loop.own(connection, arming):
            run_again(connection)

    def hung_up(connection: Connection, run: Run) -> None:
        nonlocal arming
        if abandoned(environ):
            wait.poller.remove(wait.waiter)
            loop.close(connection)
        else:  # the client has closed its side after it had sent another request
            arming = loop.arm(connection, 0, hung_up, wait.waiter.ends, time_over)
            if is_finished:  # before this thread knew the new number
                finished()

    def time_over(connection: Connection) -> None:
        wait.poller.remove(wait.waiter)
        run_again(connection)

    wait.waiter.on_finish = finished
    arming = loop.arm(connection, select.EPOLLRDHUP, hung_up, wait.waiter.ends, time_over)
    if not wait.poller.add(wait.waiter):
        finished()
