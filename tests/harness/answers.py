"""A WSGI application with answers of every kind, to test how the worker sends them."""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.processes import Process, free_port, wait_until

Start = Callable[..., Any]
BIG = bytes(range(256)) * 4096  # 1 MiB


def app(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    return ANSWERS[environ["PATH_INFO"]](environ, start)


def small(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    start("200 OK", [("Content-Length", "5")])
    return [b"small"]


def big(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    start("200 OK", [("Content-Length", str(len(BIG)))])
    return [BIG]


def huge(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    start("200 OK", [("Content-Length", str(16 * len(BIG)))])
    return [16 * BIG]


def empty(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    start("200 OK", [("Content-Length", "0")])
    return []


def nothing(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    start("204 No Content", [])
    return []


def unchanged(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    start("304 Not Modified", [("ETag", '"1"'), ("Content-Length", "5")])
    return []


def stream(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    start("200 OK", [])
    yield b"one,"
    yield b""
    time.sleep(2)
    yield b"two"


def cut(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    start("200 OK", [("Content-Length", "10")])
    yield b"part"
    raise RuntimeError("on purpose")


def file(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    source = tempfile.TemporaryFile()  # noqa: SIM115
    source.write(BIG)
    source.seek(0)
    start("200 OK", [("Content-Length", str(len(BIG)))])
    return environ["wsgi.file_wrapper"](source)


def echo(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    body = environ["wsgi.input"].read()
    start("200 OK", [("Content-Length", str(len(body)))])
    return [body]


def unread(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
    """Answers without a look at the request's body."""
    start("413 Content Too Large", [("Content-Length", "0")])
    return []


_ANSWERS = (small, big, huge, empty, nothing, unchanged, stream, cut, file, echo, unread)
ANSWERS: dict[str, Callable[[Any, Start], Iterable[bytes]]] = {f"/{answer.__name__}": answer for answer in _ANSWERS}


@contextlib.contextmanager
def served(folder: Path, threads: int = 4) -> Iterator[int]:
    """A gunicorn that serves this application with our worker, and nothing else of Loom; yields its port."""
    port = free_port()
    options = ["--bind", f"127.0.0.1:{port}", "--threads", str(threads), "--no-control-socket"]
    command = [sys.executable, "-m", "gunicorn", "-k", "loom.server.worker.Worker", *options]
    tests = str(Path(__file__).parents[1])
    process = Process([*command, "harness.answers:app"], folder / "log", env={"PYTHONPATH": tests}, cwd=folder)

    def serves() -> bool:
        assert process.runs, process.last_lines()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    wait_until(serves)
    yield port
    process.stop()


def worker(folder: Path) -> int:
    """The process number of the worker that was started in this folder."""
    return int(re.findall(r"Booting worker with pid: (\d+)", (folder / "log").read_text())[-1])
