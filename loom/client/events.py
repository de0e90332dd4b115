"""`client.events(...)`: follows the feed over restarts of servers, database and reader."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from loom.client import errors
from loom.client.coordination import Coordination
from loom.client.values import Event

WAIT_SECONDS = 20


class Cursor(Protocol):
    """Where a reader stands, kept over its restarts."""

    def load(self) -> int | None:
        """The cursor that was saved last, or None."""
        ...

    def save(self, cursor: int) -> None:
        """Must be on disk when it returns."""
        ...


class FileCursor:
    """A cursor in a file, which is replaced as a whole."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def load(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return int(self._path.read_text())
        return None

    def save(self, cursor: int) -> None:
        new = self._path.with_name(f"{self._path.name}.new")
        with new.open("w") as file:
            file.write(f"{cursor}\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def follow(
    client: Coordination,
    after: int = 0,
    *,
    store: Cursor | None = None,
    type: str | None = None,
    entity_id: str | None = None,
    project_id: str | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Event]:
    """Each event after the cursor, in order, for ever, or until `stop` is set.

    With a `store`, it goes on after the cursor that was saved last, and an event's cursor is saved when the next event
    is asked for: so an event whose handling was not finished comes again after a restart (at least once). To handle
    each exactly once, keep the cursor yourself, in the transaction in which you handle the event, and pass it as
    `after`. Raises CursorExpired when events after the cursor are no longer kept.
    """
    stop = stop or threading.Event()
    saved = store.load() if store is not None else None
    cursor = after if saved is None else saved
    while not stop.is_set():
        try:
            page = client.read_events(
                cursor,
                limit=1000,
                wait_seconds=WAIT_SECONDS,
                type=type,
                entity_id=entity_id,
                project_id=project_id,
                stop=stop,
            )
        except (errors.Unavailable, errors.Unreachable):
            stop.wait(1.0)
            continue
        for event in page.events:
            if stop.is_set():
                return
            yield event
            if store is not None and event.id is not None:
                store.save(event.id)
        if store is not None and page.next != cursor and not page.events:
            store.save(page.next)  # it moves past events that the filters leave out
        cursor = page.next
