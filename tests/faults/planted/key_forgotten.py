"""A key is not looked up: a retry after the release gets another grant."""

from __future__ import annotations

from typing import Any

from flask import Response

from app import app as app
from loom import db
from loom.http import idempotency

once = idempotency.once


def once_and_again(work: idempotency.Work, *, wait: bool = False, **more: Any) -> Response:
    if not wait:
        return once(work, **more)
    with db.connection() as conn:
        return work(conn)


idempotency.once = once_and_again
