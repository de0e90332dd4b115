"""A WSGI application with answers of every kind, to test how the worker sends them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

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


ANSWERS: dict[str, Callable[[Any, Start], Iterable[bytes]]] = {
    f"/{answer.__name__}": answer for answer in (small, big, empty, nothing, unchanged, stream, cut, file)
}
