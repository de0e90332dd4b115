"""Whether the application of this process answers at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults

PATH = "/health/live"
SECONDS = 5  # for the answer


def problem(application: Callable[..., Iterable[bytes]]) -> str | BaseException | None:
    """Ask for /health/live from a thread, as a request does. None when it answers 200."""
    said: list[str | BaseException] = ["no answer"]
    over = threading.Event()

    def ask() -> None:
        environ: dict[str, Any] = {"PATH_INFO": PATH, "RAW_URI": PATH}
        setup_testing_defaults(environ)
        try:
            body = application(environ, lambda status, headers, exc_info=None: said.append(status))
            b"".join(body)
            getattr(body, "close", lambda: None)()
        except BaseException as exc:
            said.append(exc)
        over.set()

    threading.Thread(target=ask, name="check", daemon=True).start()  # if it hangs, the process can end all the same
    if not over.wait(SECONDS):
        return f"no answer within {SECONDS} s"
    last = said[-1]
    return None if isinstance(last, str) and last.startswith("200 ") else last
