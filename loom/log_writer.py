"""Where log lines go: to stdout, stderr or a file. Nobody who logs waits for a target that takes no lines.

In a worker each target has a bounded queue and a thread that writes it. A gunicorn master must have no thread; it waits
for a target for PATIENCE at most. Lines that find no place are counted, and the count is logged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

log = logging.getLogger("loom.log")

MOST_LINES = 4000  # that wait for one target: two seconds of a busy instance, 2 MB
LINGER = 0.02  # seconds in which lines gather that are then written together
PATIENCE = 0.1  # seconds for which a process without the thread waits for its target
FLUSH_SECONDS = 1.0  # for which a process that ends waits until its lines are written
ATOMIC = select.PIPE_BUF  # bytes that a pipe takes as a whole, so that lines of several processes do not mix


class Line(NamedTuple):
    level: str
    created: float
    text: str


class Handler(logging.Handler):
    """A target of log lines."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0  # lines that were lost so far; exact enough without a lock
        self.told = 0  # of these, how many the log has told of
        self.closed = False
        self._lines: deque[Line] = deque()
        self._writing = threading.RLock()  # gunicorn's master also logs in a signal handler
        self._wake = threading.Event()
        self._idle = self._busy = self._threaded = False

    def write(self, lines: Sequence[Line], patience: float | None) -> None:
        """Write some lines. Raises OSError if the target does not take them (within `patience` seconds, if given)."""
        raise NotImplementedError

    def start(self) -> None:
        """Write in a thread from now on. Not in a process that forks."""
        self._threaded = True
        threading.Thread(target=self._run, name=f"log-{self.name}", daemon=True).start()

    def usage(self) -> dict[str, int]:
        """How many lines wait for the target, and how many were lost."""
        return {"queued": len(self._lines), "dropped": self.dropped}

    def handle(self, record: logging.LogRecord) -> bool:
        """Without the lock of logging.Handler, for which the threads of requests would queue."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        if not self.has_room():
            return
        try:
            self.put(Line(record.levelname, record.created, self.format(record)))
        except Exception:  # as in each logging handler: a line that cannot be formatted must not stop the program
            self.handleError(record)
        if record.levelno >= logging.CRITICAL:  # the process may end at once
            self.flush()

    def has_room(self) -> bool:
        """Whether a line may be put; if not, it counts as lost."""
        if len(self._lines) < MOST_LINES and not self.closed:
            return True
        self.dropped += 1
        return False

    def put(self, line: Line) -> None:
        self._lines.append(line)
        if not self._threaded:
            self._write_queued(PATIENCE)
        elif self._idle:
            self._wake.set()

    def _run(self) -> None:
        while not self.closed:
            self._idle = True
            if not self._lines:
                self._wake.wait()
            self._idle = False
            self._wake.clear()
            time.sleep(LINGER)
            self._write_queued(None)

    def _write_queued(self, patience: float | None) -> None:
        with self._writing:
            self._busy = True
            lines: list[Line] = []
            with contextlib.suppress(IndexError):
                while len(lines) < MOST_LINES:
                    lines.append(self._lines.popleft())
            try:
                self.write(lines, patience)
            except OSError:
                self.dropped += len(lines)
                return
            finally:
                self._busy = False
        if self.dropped > self.told and len(self._lines) < MOST_LINES // 2:  # else this line would be lost too
            lost, self.told = self.dropped - self.told, self.dropped
            log.warning("log-lines-dropped", extra={"fields": {"target": self.name, "count": lost}})

    def flush(self) -> None:
        """Wait until all lines are written, for FLUSH_SECONDS at most."""
        end = time.monotonic() + FLUSH_SECONDS
        while self._threaded and (self._lines or self._busy) and time.monotonic() < end:
            time.sleep(LINGER / 4)

    def close(self) -> None:
        self.closed = True
        self._wake.set()
        super().close()


class OutputHandler(Handler):
    """Writes to stdout, stderr, or a file, which is opened again when it has been renamed or removed."""

    def __init__(self, output: str) -> None:
        """Raises OSError if the file cannot be opened."""
        path = None if output in ("stdout", "stderr") else os.path.abspath(output)
        self._fd = self._open(path) if path else {"stdout": 1, "stderr": 2}[output]
        self._path = path
        super().__init__()

    @staticmethod
    def _open(path: str) -> int:
        # O_NONBLOCK: to open a named pipe that nobody reads fails, instead of waiting.
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)

    def write(self, lines: Sequence[Line], patience: float | None) -> None:
        if self._path is not None:
            self._follow_rotation(self._path)
        end = None if patience is None else time.monotonic() + patience
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        for part in _parts(lines):
            left = memoryview(part)
            while left:
                if not poll.poll(None if end is None else max(0.0, end - time.monotonic()) * 1000):
                    raise TimeoutError("nobody reads the log")
                try:
                    left = left[os.write(self._fd, left[:ATOMIC]) :]
                except BlockingIOError:  # another process was quicker
                    continue

    def _follow_rotation(self, path: str) -> None:
        try:
            now = os.stat(path)
            mine = os.fstat(self._fd)
            if (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino):
                return
        except FileNotFoundError:
            pass
        old, self._fd = self._fd, self._open(path)
        os.close(old)

    def close(self) -> None:
        if self._path is not None and not self.closed and not self._busy:
            os.close(self._fd)
        super().close()


def _parts(lines: Sequence[Line]) -> Iterator[bytes]:
    """The lines, joined to parts that a pipe takes as a whole; a line that is longer is a part of its own."""
    part = b""
    for line in lines:
        data = f"{line.text}\n".encode("ascii", "backslashreplace")
        if part and len(part) + len(data) > ATOMIC:
            yield part
            part = b""
        part += data
    yield part
