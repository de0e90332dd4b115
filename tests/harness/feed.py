"""The feed of events as a client follows it, and what it tells of the entities."""

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

# Of an entity's JSON: what no event tells of, and of an event what is no field of the entity.
DERIVED = {"blocks", "children", "open_blockers", "open_children", "current_bead", "open_claims", "agents", "comments"}
LEASE = {"lease_seconds", "lease_expires_at", "claimed_at", "not_before", "heartbeat_at", "last_active"}
UNTOLD = {*DERIVED, *LEASE, "updated_at"}
REMARKS = {"claim_ended", "reason"}


def read(client: Methods, after: int | None = 0, **query: Any) -> tuple[list[Event], int]:
    """One page, and where to go on."""
    words = {} if after is None else {"after": after}
    answer = client.get(FEED + "?" + "&".join(f"{name}={value}" for name, value in (words | query).items()))
    assert answer.status == 200, answer
    body = answer.json
    assert list(body) == ["events", "count", "next"]
    assert body["count"] == len(body["events"])
    return body["events"], body["next"]


def follow(client: Methods, after: int = 0, **query: Any) -> Iterator[Event]:
    """All that follows the cursor, until nothing more comes."""
    while True:
        found, on = read(client, after, **query)
        yield from found
        if on == after:
            return
        after = on


class Follower(threading.Thread):
    """Follows the feed, from server to server, and asks again from the same cursor when it was not answered.

    `seen`: what it was told; `longest`: seconds that one answer took.
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
    """Ids grow, and each entity has every version once, in order; after its deletion it may begin again."""
    last, versions = 0, defaultdict[tuple[str, str], int](int)
    for event in events:
        assert event["id"] > last, f"{event} after {last}"
        last, entity = event["id"], (event["entity_type"], event["entity_id"])
        assert event["version"] == versions[entity] + 1, f"{event} after version {versions[entity]}"
        versions[entity] = 0 if event["type"].endswith(".deleted") else event["version"]


def replay(events: Iterable[Event]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every entity there is at the end, by its kind and id, from the changes alone."""
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
    """The fields in which an entity, as GET answers it, is not what the feed makes of it."""
    pairs = {name: (replayed.get(name), entity.get(name)) for name in (replayed.keys() | entity.keys()) - UNTOLD}
    return {name: pair for name, pair in pairs.items() if _plain(pair[0]) != _plain(pair[1])}


def _plain(value: Any) -> Any:
    """One form for what is empty or left out, and for a time."""
    if isinstance(value, str) and len(value) > 18 and value[10:11] == "T":
        try:
            return datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return value
    return value or None
