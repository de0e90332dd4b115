"""The calls of coordination: locks, claims, files, events. Each is named as its operation in the contract."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loom.client import errors
from loom.client.base import V1, Base, given, path_of
from loom.client.values import (
    Claim,
    Event,
    EventPage,
    FileLock,
    Grant,
    HeartbeatResult,
    HeldLock,
    Json,
    PastGrant,
    of_json,
)


class Coordination(Base):
    """Locks, claims, file locks, and events."""

    def acquire_lock(
        self,
        name: str,
        *,
        owner: str,
        ttl_seconds: int = 30,
        wait_seconds: int = 0,
        metadata: Json | None = None,
        **more: Any,
    ) -> Grant:
        """A new grant, or the one that the owner already holds, extended. Raises LockHeld."""
        return self.try_acquire(name, owner, ttl_seconds, wait_seconds, metadata, **more)[0]

    def try_acquire(
        self, name: str, owner: str, ttl: int, wait: int = 0, metadata: Json | None = None, **more: Any
    ) -> tuple[Grant, float]:
        """The grant, and when the request was sent, from which the TTL may be trusted."""
        body = given(owner=owner, ttl_seconds=ttl, wait_seconds=wait, metadata=metadata)
        answer = self.send("POST", path_of("locks", name), body=body, wait=wait, **more)
        return of_json(Grant, answer.json), answer.sent

    def renew_lock(self, name: str, fencing_token: int, *, ttl_seconds: int = 30, **more: Any) -> Grant:
        """Raises LockLost."""
        body = {"fencing_token": fencing_token, "ttl_seconds": ttl_seconds}
        return of_json(Grant, self.send("PUT", path_of("locks", name), body=body, **more).json)

    def send_renewal(self, name: str, fencing_token: int, ttl: int, timeout: float) -> float:
        """Renew a lock, and return when the request was sent, from which the TTL may be trusted. Raises LockLost."""
        body = {"fencing_token": fencing_token, "ttl_seconds": ttl}
        return self.send("PUT", path_of("locks", name), body=body, timeout=timeout).sent

    def release_lock(
        self, name: str, fencing_token: int, *, force: bool = False, reason: str | None = None, **more: Any
    ) -> None:
        """Release a lock; with `force`, end the grant of that token, whoever holds it. Raises LockLost, LockHeld."""
        query = given(fencing_token=fencing_token, force="true" if force else None, reason=reason)
        self.send("DELETE", path_of("locks", name), query=query, **more)

    def get_lock(self, name: str) -> HeldLock | None:
        """Who holds the lock, and how many wait for it; None when it is free."""
        try:
            return of_json(HeldLock, self.send("GET", path_of("locks", name)).json)
        except errors.NotFound:
            return None

    def list_locks(self, *, prefix: str | None = None, owner: str | None = None) -> Iterator[Grant]:
        return (of_json(Grant, row) for row in self.rows(f"{V1}/locks", prefix=prefix, owner=owner))

    def list_grants(
        self, *, lock_name: str | None = None, owner: str | None = None, limit: int | None = None
    ) -> Iterator[PastGrant]:
        """The history, newest first. `limit`: rows of a page."""
        rows = self.rows(f"{V1}/grants", lock_name=lock_name, owner=owner, limit=limit)
        return (of_json(PastGrant, row) for row in rows)

    def claim_next_bead(
        self,
        agent_id: str,
        *,
        lease_seconds: int = 1800,
        project_id: str | None = None,
        types: Sequence[str] = (),
        tags: Sequence[str] = (),
        **more: Any,
    ) -> Claim | None:
        """The best ready bead, or None if nothing is ready. Raises AgentBusy."""
        body = given(agent_id=agent_id, lease_seconds=lease_seconds, project_id=project_id)
        body |= {"types": list(types), "tags": list(tags)}
        answer = self.send("POST", f"{V1}/beads/claim", body=body, once=True, **more)
        return of_json(Claim, answer.json) if answer.status == 200 else None

    def claim_bead(self, bead_id: str, agent_id: str, *, lease_seconds: int = 1800, **more: Any) -> Claim:
        """This bead; the same claim again if the agent has it.

        Raises BeadClaimed, BeadBlocked, BeadClosed, AgentBusy.
        """
        body = {"agent_id": agent_id, "lease_seconds": lease_seconds}
        return of_json(Claim, self.send("POST", path_of("beads", bead_id, "claim"), body=body, **more).json)

    def renew_claim(self, bead_id: str, fencing_token: int, *, lease_seconds: int | None = None, **more: Any) -> Claim:
        """Raises ClaimLost."""
        body = given(fencing_token=fencing_token, lease_seconds=lease_seconds)
        return of_json(Claim, self.send("PUT", path_of("beads", bead_id, "claim"), body=body, **more).json)

    def release_claim(self, bead_id: str, fencing_token: int, *, reason: str | None = None, **more: Any) -> None:
        """Give the bead back as if it had never been claimed. Raises ClaimLost."""
        query = given(fencing_token=fencing_token, reason=reason)
        self.send("DELETE", path_of("beads", bead_id, "claim"), query=query, **more)

    def complete_bead(
        self,
        bead_id: str,
        fencing_token: int,
        *,
        close_reason: str | None = None,
        context: Json | None = None,
        **more: Any,
    ) -> Json:
        """Close the bead. Raises ClaimLost, OpenChildren."""
        body = given(fencing_token=fencing_token, close_reason=close_reason, context=context)
        return self.send("POST", path_of("beads", bead_id, "complete"), body=body, **more).json

    def fail_bead(
        self,
        bead_id: str,
        fencing_token: int,
        *,
        reason: str | None = None,
        retry_after_seconds: int | None = None,
        **more: Any,
    ) -> Json:
        """Give the bead back after a failure. Raises ClaimLost."""
        body = given(fencing_token=fencing_token, reason=reason, retry_after_seconds=retry_after_seconds)
        return self.send("POST", path_of("beads", bead_id, "fail"), body=body, **more).json

    def redispatch_bead(self, bead_id: str, *, reason: str | None = None) -> Json:
        """Take the bead away from its holder."""
        return self.send("POST", path_of("beads", bead_id, "redispatch"), body=given(reason=reason), once=True).json

    def send_heartbeat(
        self, agent_id: str, *, claims: Mapping[str, int] | None = None, status: str | None = None, **more: Any
    ) -> HeartbeatResult:
        """`claims`: the beads that the agent still works on, each with its fencing token."""
        return self.heartbeat(agent_id, claims or {}, status, **more)[0]

    def heartbeat(
        self, agent_id: str, claims: Mapping[str, int], status: str | None = None, **more: Any
    ) -> tuple[HeartbeatResult, float]:
        """The result, and when the request was sent, from which the leases may be trusted."""
        body = given(claims=dict(claims), status=status)
        answer = self.send("POST", path_of("agents", agent_id, "heartbeat"), body=body, **more)
        claim = {"bead": {}, "fencing_token": 0}
        ends = {
            bead: of_json(Claim, {**claim, "lease_expires_at": end}).lease_expires_at
            for bead, end in answer.json["extended"].items()
        }
        return HeartbeatResult(ends, answer.json["lost"]), answer.sent

    def lock_file(
        self, file_path: str, project_id: str, agent_id: str, *, bead_id: str | None = None, **more: Any
    ) -> FileLock:
        """Raises LockHeld; ClaimLost if the agent has not claimed that bead."""
        body = given(file_path=file_path, project_id=project_id, agent_id=agent_id, bead_id=bead_id)
        return of_json(FileLock, self.send("POST", f"{V1}/file-locks", body=body, **more).json)

    def unlock_file(self, file_path: str, project_id: str, agent_id: str, **more: Any) -> None:
        """Raises NotFound if the agent does not hold it."""
        self.delete(path_of("file-locks", project_id, file_path), query={"agent_id": agent_id}, **more)

    def list_file_locks(self, *, project_id: str | None = None) -> Iterator[FileLock]:
        return (of_json(FileLock, row) for row in self.rows(f"{V1}/file-locks", project_id=project_id))

    def read_events(
        self,
        after: int | None = None,
        *,
        limit: int = 100,
        wait_seconds: int = 0,
        type: str | None = None,
        entity_id: str | None = None,
        project_id: str | None = None,
        stop: threading.Event | None = None,
    ) -> EventPage:
        """The changes since a cursor; without one, the latest. Raises CursorExpired."""
        query = given(
            after=after,
            limit=limit,
            wait_seconds=wait_seconds,
            type=type,
            entity_id=entity_id,
            project_id=project_id,
        )
        answer = self.send("GET", f"{V1}/events", query=query, wait=wait_seconds, stop=stop)
        if not answer.json["events"] and answer.retry_after:  # too many wait at that instance
            (stop or threading.Event()).wait(answer.retry_after)
        return EventPage([of_json(Event, event) for event in answer.json["events"]], answer.json["next"])
