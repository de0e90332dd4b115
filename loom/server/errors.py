"""Requests that gunicorn refuses before they reach the application are answered as the application's errors are."""

from __future__ import annotations

import socket

import msgspec
from gunicorn import util

TYPES = {400: "invalid", 414: "uri-too-long", 431: "headers-too-large", 501: "not-implemented"}


def write_problem(sock: socket.socket, status: int, reason: str, message: str) -> None:
    """As gunicorn's write_error(), which writes HTML."""
    problem = {
        "type": f"/problems/{TYPES.get(status) or reason.lower().replace(' ', '-')}",
        "title": f"{reason}.",
        "status": status,
        "detail": message,
        "error": message or f"{reason}.",
    }
    body = msgspec.json.encode(problem)
    head = (
        f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/problem+json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    util.write_nonblock(sock, head.encode() + body)
