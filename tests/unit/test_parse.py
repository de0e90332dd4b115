"""Parsing of request bodies, as far as it can be tested without a request."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import msgspec

from loom.config import Config
from loom.http.parse import Body
from loom.routes import create_app


def inspects_annotations(kind: type) -> bool:
    """Whether decoding a `kind` makes msgspec inspect its annotations first."""
    called = set()

    def note(frame: FrameType, event: str, arg: Any) -> None:
        called.add(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        msgspec.json.decode(b"{}", type=kind)
    finally:
        sys.setprofile(None)
    return "get_class_annotations" in called


def test_a_worker_does_not_crash_when_its_first_requests_arrive_at_once() -> None:
    """Two threads that made msgspec inspect one Struct at once ended the worker with SIGSEGV (1 of 60 starts)."""

    class Before(Body):
        field: int = 0

    create_app(Config())

    class After(Body):
        field: int = 0

    assert not inspects_annotations(Before)
    assert inspects_annotations(After)
