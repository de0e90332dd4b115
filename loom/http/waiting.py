"""Requests that wait, in this worker."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any, cast

from flask import current_app, request

from loom import instances
from loom.locks.queue import Queue
from loom.state.events import Watch
from loom.waiting import Room


class Waiting:
    """The waiting requests of an application: at most half of its threads, or all but eight where that is more."""

    def __init__(self, threads: int) -> None:
        room = Room(max(1, threads - 8, threads // 2), _draining)
        self.locks = Queue(room)
        # At most half of the room: a request that waits for a lock stands in a queue, and must get in.
        self.events = Watch(room, max(1, room.most // 2))


def waiting() -> Waiting:
    """Those of the application that serves this request."""
    return cast(Any, current_app).waiting


def gone() -> Callable[[], bool]:
    """Whether the client of this request has hung up, for other threads to ask."""
    return functools.partial(client_gone, request.environ)


def client_gone(environ: dict[str, Any]) -> bool:
    """Whether the client of a request has hung up: nobody would read the answer. False when that can't be told."""
    sock = environ.get("gunicorn.socket")
    try:
        return sock is not None and sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except ConnectionError:
        return True
    except (OSError, ValueError):  # nothing to read: it waits; or TLS, which takes no flags
        return False


def _draining() -> bool:
    return instances.current is not None and instances.current.draining
