"""What one agent holds for as long as its session lasts: claims and files, kept alive, and given back at the end."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence

from loom.client import errors
from loom.client.base import path_of
from loom.client.coordination import Coordination
from loom.client.values import Claim, FileLock, Json

log = logging.getLogger("loom.client")

LEASE_SECONDS = 120  # a session that ends without a word gives its beads back after this
FILE_SECONDS = 600


class Session:
    """An agent that thinks for long between its calls: a thread sends its heartbeats meanwhile."""

    def __init__(self, client: Coordination, agent: str, project: str | None) -> None:
        """Gives back what an earlier session of the agent has left."""
        self.agent, self.project = agent, project
        self.claims: dict[str, Claim] = {}
        self.files: dict[str, FileLock] = {}
        self.lost: dict[str, str] = {}  # what was lost, and why, until the agent has been told
        self._client = client
        self._lock = threading.Lock()  # a call that claims or locks, and the end of the session
        self._over = threading.Event()
        for bead in client.rows(path_of("beads"), assigned_to=agent, status="in_progress"):
            if bead.get("fencing_token") is not None:
                with contextlib.suppress(errors.Conflict):
                    client.release_claim(bead["id"], bead["fencing_token"], reason="a new session of the agent")
        self._keeper = threading.Thread(target=self._keep, name=f"session {agent}", daemon=True)
        self._keeper.start()

    def claim(self, bead: str | None, types: Sequence[str] = ()) -> Claim | None:
        with self._lock:
            self._check_open()
            if bead is not None:
                claim: Claim | None = self._client.claim_bead(bead, self.agent, lease_seconds=LEASE_SECONDS)
            else:
                claim = self._client.claim_next_bead(
                    self.agent, lease_seconds=LEASE_SECONDS, project_id=self.project, types=types
                )
            if claim is not None:
                self.claims[claim.bead["id"]] = claim
        return claim

    def end(self, bead: str, how: str, **more: object) -> Json | None:
        """`how`: complete_bead, fail_bead or release_claim. Raises ClaimLost."""
        claim = self.claims.get(bead)
        if claim is None:
            raise errors.ClaimLost(f"this session has no claim on {bead}: {self.lost.get(bead, 'it was not claimed')}")
        try:
            answer: Json | None = getattr(self._client, how)(bead, claim.fencing_token, **more)
        except errors.ClaimLost:
            self.claims.pop(bead, None)
            raise
        self.claims.pop(bead, None)
        for path, file in list(self.files.items()):
            if file.bead_id == bead:
                del self.files[path]
        return answer

    def lock_files(self, paths: Sequence[str], bead: str | None) -> list[FileLock]:
        """All of them, or none. Raises LockHeld."""
        taken: list[FileLock] = []
        with self._lock:
            self._check_open()
            try:
                for path in sorted(set(paths)):
                    taken.append(self._client.lock_file(path, self._in_project(), self.agent, bead_id=bead))
            except errors.Error:
                for file in taken:
                    if file.file_path not in self.files:
                        self._unlock(file)
                raise
            for file in taken:
                self.files[file.file_path] = file
        return taken

    def unlock_files(self, paths: Sequence[str]) -> None:
        for path in paths:
            file = self.files.pop(path, None)
            if file is not None:
                self._unlock(file)

    def close(self) -> None:
        """Give everything back, also what a call that is still on its way takes."""
        self._over.set()
        with self._lock:
            for bead, claim in list(self.claims.items()):
                with contextlib.suppress(errors.Error):
                    self._client.release_claim(
                        bead, claim.fencing_token, reason="the agent's session has ended", timeout=3
                    )
            for file in list(self.files.values()):
                self._unlock(file)
            self.claims.clear()
            self.files.clear()

    def _unlock(self, file: FileLock) -> None:
        with contextlib.suppress(errors.Error):
            self._client.unlock_file(file.file_path, file.project_id, file.agent_id, timeout=3)

    def _check_open(self) -> None:
        if self._over.is_set():
            raise errors.Conflict("the session has ended")

    def _in_project(self) -> str:
        if self.project is None:
            raise errors.Invalid("files are locked in a project: start loom mcp with --project", status=400)
        return self.project

    def _keep(self) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            pause = LEASE_SECONDS / 6
            claims = {bead: claim.fencing_token for bead, claim in list(self.claims.items())}
            try:
                result = self._client.send_heartbeat(self.agent, claims=claims, timeout=10)
            except errors.Error as exc:
                log.warning("no heartbeat of %s: %s", self.agent, exc)
                pause = 2.0
                continue
            for bead, why in result.lost.items():
                if self.claims.get(bead) is not None and self.claims[bead].fencing_token == claims[bead]:
                    del self.claims[bead]
                    self.lost[bead] = f"the claim was {why}"
            for path, file in list(self.files.items()):
                try:
                    self._client.renew_lock(file.lock_name, file.fencing_token, ttl_seconds=FILE_SECONDS, timeout=10)
                except errors.LockLost as exc:
                    if self.files.pop(path, None) is not None and file.bead_id not in result.lost:
                        self.lost[path] = f"the lock was {exc.members.get('ended_how')}"
                except errors.Error:
                    pause = 2.0
