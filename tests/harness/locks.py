"""Requests to the lock interface, and checks of their answers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any
from urllib.parse import quote

from harness.client import Answer, Methods
from harness.processes import wait_until

Sql = Callable[..., list[tuple[Any, ...]]]

LOCKS = "/api/v1/locks/"
BUILD = LOCKS + "build"


def acquire(client: Methods, name: str = "build", **body: Any) -> dict[str, Any]:
    answer = client.post(LOCKS + quote(name), body)
    assert answer.status in (200, 201), answer
    return answer.json


def release(client: Methods, token: int, name: str = "build") -> Answer:
    return client.delete(f"{LOCKS}{quote(name)}?fencing_token={token}")


def force(client: Methods, token: int | str, name: str = "build", more: str = "") -> Answer:
    return client.delete(f"{LOCKS}{quote(name)}?force=true&fencing_token={token}{more}")


def instant(text: str) -> datetime:
    assert text.endswith("Z"), "RFC 3339 in UTC"
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def seconds(grant: dict[str, Any]) -> float:
    """Return the seconds from the last acquire or renewal to the end of the grant."""
    return round((instant(grant["expires_at"]) - instant(grant["heartbeat_at"])).total_seconds(), 3)


def wait_expired(sql: Sql, name: str = "build") -> None:
    """Wait until the grant has expired by the database's clock."""
    wait_until(
        lambda: sql("SELECT expires_at <= clock_timestamp() FROM distributed_locks WHERE lock_name = %s", name)[0][0]
    )


def assert_problem(answer: Answer, status: int, word: str, **members: Any) -> dict[str, Any]:
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/problem+json"), answer
    problem = answer.json
    assert problem["type"] == f"/problems/{word}"
    assert problem["status"] == status
    assert problem["title"]
    assert isinstance(problem["error"], str)
    assert "\n" not in problem["error"]
    assert {name: problem[name] for name in members} == members
    return problem


def assert_lost(answer: Answer, how: str | None, holder: str | None = None) -> dict[str, Any]:
    problem = assert_problem(answer, 409, "lock-lost", ended_how=how)
    assert (problem["ended_at"] is None) == (how is None)
    assert (problem["holder"] and problem["holder"]["owner"]) == holder
    assert "fencing_token" not in (problem["holder"] or {})
    return problem
