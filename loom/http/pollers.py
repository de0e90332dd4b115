"""The requests that wait in this worker."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any, cast

from flask import current_app, request

from loom import instances
from loom.locks.queue import LockPoller
from loom.state.events import EventPoller
from loom.waiting import WaitLimit


class Pollers:
    """The pollers of an application. At most half of its threads may wait, or all but eight if that is more."""

    def __init__(self, threads: int) -> None:
        limit = WaitLimit(max(1, threads - 8, threads // 2), _draining)
        self.locks = LockPoller(limit)
        # At most half of the waiting requests: a request for a lock has a place in a queue and must be able to wait.
        self.events = EventPoller(limit, max(1, limit.most // 2))


def pollers() -> Pollers:
    """The pollers of the application that serves this request."""
    return cast(Any, current_app).pollers


def client_gone_check() -> Callable[[], bool]:
    """A function that tells other threads whether the client of this request has hung up."""
    return functools.partial(client_gone, request.environ)


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
