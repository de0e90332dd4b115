"""The feed of events as a client follows it, and the entities that result from it."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from harness.client import Client, Methods

Event = dict[str, Any]

FEED = "/api/v1/events"

# Fields of an entity that no event has, and `changes` of an event that are no fields of its entity.
DERIVED = {"blocks", "children", "open_blockers", "open_children", "current_bead", "open_claims", "agents", "comments"}
LEASE = {"lease_seconds", "lease_expires_at", "claimed_at", "not_before", "heartbeat_at", "last_active"}
NOT_IN_EVENTS = {*DERIVED, *LEASE, "updated_at"}
REMARKS = {"claim_ended", "reason"}


def read(client: Methods, after: int | None = 0, **query: Any) -> tuple[list[Event], int]:
    """Return one page and the next cursor."""
    words = {} if after is None else {"after": after}
    answer = client.get(FEED + "?" + "&".join(f"{name}={value}" for name, value in (words | query).items()))
    assert answer.status == 200, answer
    body = answer.json
    assert list(body) == ["events", "count", "next"]
    assert body["count"] == len(body["events"])
    return body["events"], body["next"]


def follow(client: Methods, after: int = 0, **query: Any) -> Iterator[Event]:
    """Yield all events after the cursor, until a page is empty."""
    while True:
        found, on = read(client, after, **query)
        yield from found
        if on == after:
            return
        after = on


class Follower(threading.Thread):
    """Follows the feed; retries from the same cursor at the next server when a request fails.

    `seen`: the events; `longest`: seconds that the slowest answer took.
    """

    def __init__(self, servers: Sequence[str | int], first: int = 0, limit: int = 50) -> None:
        super().__init__(daemon=True)
        self.seen, self.longest = list[Event](), 0.0
        self._clients = [Client(server, 10) for server in (*servers[first:], *servers[:first])]
        self._query = f"limit={limit}&wait_seconds=1"
        self._over = threading.Event()

    def run(self) -> None:
        after = 0
        while True:
            last, asked = self._over.is_set(), time.monotonic()
            with contextlib.suppress(OSError, http.client.HTTPException):
                try:
                    answer = self._clients[0].get(f"{FEED}?after={after}&{self._query}")
                finally:
                    self.longest = max(self.longest, time.monotonic() - asked)
                if answer.status == 200:
                    self.seen += answer.json["events"]
                    if last and after == answer.json["next"]:
                        break
                    after = answer.json["next"]
                    continue
                assert answer.status in (502, 503, 504), answer
            self._clients.append(self._clients.pop(0))
            time.sleep(0.1)
        for client in self._clients:
            client.close()

    def stop(self) -> None:
        self._over.set()
        self.join()


def assert_in_order(events: Iterable[Event]) -> None:
    """Ids grow, and each entity has every version once, in order; after a deletion they may start at 1 again."""
    last, versions = 0, defaultdict[tuple[str, str], int](int)
    for event in events:
        assert event["id"] > last, f"{event} after {last}"
        last, entity = event["id"], (event["entity_type"], event["entity_id"])
        assert event["version"] == versions[entity] + 1, f"{event} after version {versions[entity]}"
        versions[entity] = 0 if event["type"].endswith(".deleted") else event["version"]


def replay(events: Iterable[Event]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the entities that exist at the end, by kind and id, from the changes alone."""
    entities: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        entity = event["entity_type"], event["entity_id"]
        if event["type"].endswith(".deleted"):
            del entities[entity]
        else:
            told = {name: value for name, value in event["changes"].items() if name not in REMARKS}
            entities[entity] = {**entities.get(entity, {}), **told, "version": event["version"]}
    return entities


def differences(replayed: dict[str, Any], entity: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which an entity, as GET answers it, differs from the one replayed from the feed."""
    pairs = {name: (replayed.get(name), entity.get(name)) for name in (replayed.keys() | entity.keys()) - NOT_IN_EVENTS}
    return {name: pair for name, pair in pairs.items() if _plain(pair[0]) != _plain(pair[1])}


def _plain(value: Any) -> Any:
    """Return one form for empty and absent values, and one for times."""
    if isinstance(value, str) and len(value) > 18 and value[10:11] == "T":
        try:
            return datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return value
    return value or None
