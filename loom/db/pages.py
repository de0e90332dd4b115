"""Pages of lists, which are bounded in rows, in bytes, and in what they need of this process's memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

from loom import errors
from loom.bounds import bounds
from loom.db.connection import Connection

T = TypeVar("T")

SMALL = bounds.page_bytes // 8
# A page of `bounds.page_bytes` needs up to seven times as much while it is made: as libpq's result, as rows, as text of
# four bytes a character, as JSON. So only two threads make one at the same time.
_large_pages = threading.BoundedSemaphore(2)
_state = threading.local()


class Page(Generic[T]):
    """The rows of one page of a list. Each is decoded when it is iterated over."""

    def __init__(
        self, conn: Connection, kind: type[T] | Callable[[bytes], T], sql: str, limit: int, /, **params: Any
    ) -> None:
        """sql: a query for one column of JSON as text. It is read only until there are enough rows, or bytes.

        Raises Busy when too many large pages are made at the same time.
        """
        found = self._read(conn, sql, limit, params, SMALL)
        if found and found[-1] is None and len(found) <= limit:
            begin_large_page(conn)
            found = self._read(conn, sql, limit, params, bounds.page_bytes)
        self._cut = bool(found) and found[-1] is None
        self._rows = found[: -1 if self._cut else None][::-1]
        self._decode = kind if not isinstance(kind, type) else msgspec.json.Decoder(kind).decode

    def _read(self, conn: Connection, sql: str, limit: int, params: dict[str, Any], most: int) -> list[Any]:
        return [
            row["it"]
            for row in conn.execute(
                f"DECLARE page NO SCROLL CURSOR FOR {sql}; SELECT first_rows('page', %(most_rows)s, %(most)s) AS it",
                {**params, "most_rows": limit, "most": most},
                as_bytes=True,
            )
        ]

    @property
    def more(self) -> bool:
        """Whether more rows follow those that have been iterated over."""
        return self._cut or bool(self._rows)

    def __iter__(self) -> Iterator[T]:
        while self._rows:
            yield self._decode(self._rows.pop())


def begin_large_page(conn: Connection) -> None:
    """Waits until this thread may make a large page. It may until end_of_answer()."""
    if not getattr(_state, "large", False):
        # Half of the time left is for reading it: a connection that is cut off looks like a silent server.
        if not _large_pages.acquire(timeout=max(0.0, (conn.deadline - time.monotonic()) / 2)):
            raise errors.Busy("Too many large answers are being made.")
        _state.large = True


def end_of_answer() -> None:
    """This thread's answer has been made."""
    if getattr(_state, "large", False):
        _state.large = False
        _large_pages.release()
