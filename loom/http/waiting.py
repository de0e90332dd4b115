"""Requests that wait, in this worker."""

from __future__ import annotations

import functools
from collections.abc import Callable

from flask import request

from loom import instances
from loom.http.settings import own
from loom.http.worker import client_gone
from loom.waiting import Room


@functools.cache
def room() -> Room:
    """Half of the threads, or all but eight where that is more."""
    threads = own().server.threads
    return Room(max(1, threads - 8, threads // 2), _draining)


def gone() -> Callable[[], bool]:
    """Whether the client of this request has hung up, for other threads to ask."""
    return functools.partial(client_gone, request.environ)


def _draining() -> bool:
    return instances.current is not None and instances.current.draining
