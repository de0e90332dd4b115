"""Checks that the application of this process answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults

PATH = "/health/live"
SECONDS = 5  # for the answer


def problem(application: Callable[..., Iterable[bytes]]) -> str | BaseException | None:
    """Request /health/live in a thread, like any request. Returns None if the answer is 200, else what went wrong."""
    results: list[str | BaseException] = ["no answer"]
    finished = threading.Event()

    def ask() -> None:
        environ: dict[str, Any] = {"PATH_INFO": PATH, "RAW_URI": PATH}
        setup_testing_defaults(environ)
        try:
            body = application(environ, lambda status, headers, exc_info=None: results.append(status))
            b"".join(body)
            getattr(body, "close", lambda: None)()
        except BaseException as exc:
            results.append(exc)
        finished.set()

    threading.Thread(
        target=ask, name="check", daemon=True
    ).start()  # a daemon: the process can end even if the request hangs
    if not finished.wait(SECONDS):
        return f"no answer within {SECONDS} s"
    last = results[-1]
    return None if isinstance(last, str) and last.startswith("200 ") else last
