"""A tooz driver: tooz.coordination.get_coordinator("loom://localhost:8080", b"member").

Locks, members of groups and leaders are locks of Loom, which are renewed while the process lives; a group exists as a
shared setting, `tooz:` and its id. Several instances: `loom://host:8080,other:8080`. Options: `timeout` (TTL, 30 s),
`tls=1`; `api_key`.
"""

from __future__ import annotations

import base64
import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote, unquote_to_bytes

import tooz
from tooz import coordination, locking, utils

from loom.client import Client, Lock, errors

T = TypeVar("T")
FOREVER = 10.0**9
GROUP = "tooz:"


def _name(kind: str, *ids: bytes) -> str:
    return "/".join(("tooz", kind, *(quote(utils.to_binary(id), safe="") for id in ids)))


def _translated(function: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        try:
            return function(*args, **kwargs)
        except (errors.Unreachable, errors.Unavailable) as exc:
            raise coordination.ToozConnectionError(str(exc)) from exc
        except errors.Error as exc:
            raise tooz.ToozError(str(exc)) from exc

    return call


class LoomLock(locking.Lock):
    """One lock; it is renewed until it is released."""

    def __init__(self, driver: LoomDriver, name: bytes) -> None:
        super().__init__(name)
        self._driver = driver
        self._lock: Lock | None = None

    @_translated
    def acquire(self, blocking: bool | float = True, shared: bool = False, timeout: int | None = None) -> bool:
        if shared:
            raise tooz.NotImplemented("Loom's locks are exclusive")
        if self.acquired and not blocking:
            return False
        wait = (FOREVER if blocking else 0.0) if isinstance(blocking, bool) else float(blocking)
        lock = self._driver.client.lock(_name("lock", self.name), ttl=timeout or self._driver.ttl)
        try:
            lock.acquire(wait)
        except errors.LockHeld:
            return False
        self._lock = lock
        self._driver.acquired.add(self)
        return True

    @_translated
    def release(self) -> bool:
        lock, self._lock = self._lock, None
        self._driver.acquired.discard(self)
        if lock is None:
            return False
        try:
            lock.release()
        except errors.LockLost:
            return False
        return True

    @_translated
    def break_(self) -> bool:
        held = self._driver.client.get_lock(_name("lock", self.name))
        if held is None:
            return False
        self._driver.client.release_lock(held.lock_name, held.fencing_token, force=True, reason="tooz break_")
        return True

    @_translated
    def is_still_owner(self) -> bool:
        if not self.acquired or self._lock is None:
            return False
        held = self._driver.client.get_lock(self._lock.lock_name)
        return held is not None and held.fencing_token == self._lock.fencing_token

    @property
    def acquired(self) -> bool:
        return self._lock is not None and not self._lock.lost

    @property
    def fencing_token(self) -> int | None:
        """Fences writes; None while it is not held."""
        return self._lock.fencing_token if self._lock is not None else None


class LoomDriver(
    coordination.CoordinationDriverCachedRunWatchers,
    coordination.CoordinationDriverWithExecutor,
):
    """Locks, groups and leaders, on Loom."""

    CHARACTERISTICS = (
        coordination.Characteristics.NON_TIMEOUT_BASED,
        coordination.Characteristics.DISTRIBUTED_ACROSS_THREADS,
        coordination.Characteristics.DISTRIBUTED_ACROSS_PROCESSES,
        coordination.Characteristics.DISTRIBUTED_ACROSS_HOSTS,
        coordination.Characteristics.LINEARIZABLE,
        coordination.Characteristics.SERIALIZABLE,
    )

    def __init__(self, member_id: bytes, parsed_url: Any, options: dict[str, Any]) -> None:
        super().__init__(member_id, parsed_url, options)
        given = utils.collapse(options)
        scheme = "https" if given.get("tls") else "http"
        hosts = (parsed_url.netloc or "localhost:8080").split(",")
        self.client = Client([f"{scheme}://{host}" for host in hosts], api_key=given.get("api_key"), timeout=15.0)
        self.ttl = int(given.get("timeout", 30))
        self.acquired: set[LoomLock] = set()
        self._members: dict[bytes, Lock] = {}
        self._leads: dict[bytes, Lock] = {}

    @_translated
    def _start(self) -> None:
        super()._start()
        self.client.read_events(limit=1)

    def _stop(self) -> None:
        held: list[LoomLock | Lock] = [*self.acquired, *self._leads.values(), *self._members.values()]
        for lock in held:
            with contextlib.suppress(errors.Error, tooz.ToozError):  # else it expires
                lock.release()
        self._members.clear()
        self._leads.clear()
        super()._stop()

    def get_lock(self, name: bytes) -> LoomLock:
        return LoomLock(self, name)

    def heartbeat(self) -> float:
        """Threads of the client do it."""
        return float(self.ttl)

    def _later(self, function: Callable[[], T]) -> Any:
        return coordination.CoordinatorResult(self._executor.submit(_translated(function)))

    def _changing(self, group: bytes) -> Lock:
        """A group is created, deleted and joined under its lock."""
        return self.client.lock(_name("change", group), ttl=10, wait=30)

    def _require(self, group: bytes) -> None:
        try:
            self.client.get_config_value(GROUP + quote(group, safe=""))
        except errors.NotFound:
            raise coordination.GroupNotCreated(group) from None

    def _in(self, group: bytes) -> dict[bytes, Any]:
        prefix = _name("member", group) + "/"
        return {
            unquote_to_bytes(grant.lock_name.removeprefix(prefix)): utils.loads(
                base64.b64decode(grant.metadata["capabilities"])
            )
            for grant in self.client.list_locks(prefix=prefix)
        }

    def create_group(self, group_id: bytes) -> Any:
        def create() -> None:
            key = GROUP + quote(group_id, safe="")
            with self._changing(group_id):
                try:
                    self.client.get_config_value(key)
                except errors.NotFound:
                    self.client.put_config_value(key, {})
                else:
                    raise coordination.GroupAlreadyExist(group_id)

        return self._later(create)

    def delete_group(self, group_id: bytes) -> Any:
        def delete() -> None:
            with self._changing(group_id):
                self._require(group_id)
                if self._in(group_id):
                    raise coordination.GroupNotEmpty(group_id)
                self.client.delete_config_value(GROUP + quote(group_id, safe=""))

        return self._later(delete)

    def get_groups(self) -> Any:
        def groups() -> list[bytes]:
            return [unquote_to_bytes(key.removeprefix(GROUP)) for key in self._shared() if key.startswith(GROUP)]

        return self._later(groups)

    def _shared(self) -> list[str]:
        return list(self.client.get_config()["shared"])

    def _about(self, capabilities: Any) -> dict[str, str]:
        return {"capabilities": base64.b64encode(utils.dumps(capabilities)).decode()}

    def join_group(self, group_id: bytes, capabilities: Any = None) -> Any:
        def join() -> None:
            name = _name("member", group_id, self._member_id)
            lock = self.client.lock(name, ttl=self.ttl, metadata=self._about(capabilities))
            with self._changing(group_id):
                self._require(group_id)
                try:
                    lock.acquire()
                except errors.LockHeld:
                    raise coordination.MemberAlreadyExist(group_id, self._member_id) from None
            self._members[group_id] = lock
            self._joined_groups.add(group_id)

        return self._later(join)

    def leave_group(self, group_id: bytes) -> Any:
        def leave() -> None:
            lock = self._members.pop(group_id, None)
            self._joined_groups.discard(group_id)
            try:
                if lock is not None:
                    lock.release()
                    return
            except errors.LockLost:
                pass
            # Another process of the same member may have joined.
            held = self.client.get_lock(_name("member", group_id, self._member_id))
            if held is None or lock is not None:
                raise coordination.MemberNotJoined(group_id, self._member_id)
            self.client.release_lock(held.lock_name, held.fencing_token, force=True, reason="tooz leave_group")

        return self._later(leave)

    def get_members(self, group_id: bytes) -> Any:
        def members() -> set[bytes]:
            self._require(group_id)
            return set(self._in(group_id))

        return self._later(members)

    def get_member_capabilities(self, group_id: bytes, member_id: bytes) -> Any:
        def capabilities() -> Any:
            found = self._in(group_id)
            if member_id not in found:
                raise coordination.MemberNotJoined(group_id, member_id)
            return found[member_id]

        return self._later(capabilities)

    def get_members_with_capabilities(self, group_id: bytes) -> Any:
        def members() -> dict[bytes, Any]:
            self._require(group_id)
            return self._in(group_id)

        return self._later(members)

    def update_capabilities(self, group_id: bytes, capabilities: Any) -> Any:
        def update() -> None:
            lock = self._members.get(group_id)
            if lock is None or lock.lost:
                raise coordination.MemberNotJoined(group_id, self._member_id)
            self.client.try_acquire(lock.lock_name, lock.owner, self.ttl, metadata=self._about(capabilities))

        return self._later(update)

    # --- leaders

    def watch_elected_as_leader(self, group_id: bytes, callback: Any) -> None:
        self._hooks_elected_leader[group_id].append(callback)

    def unwatch_elected_as_leader(self, group_id: bytes, callback: Any) -> None:
        try:
            self._hooks_elected_leader[group_id].remove(callback)
        except ValueError:
            raise coordination.WatchCallbackNotFound(group_id, callback) from None
        if not self._hooks_elected_leader[group_id]:
            del self._hooks_elected_leader[group_id]

    @_translated
    def run_elect_coordinator(self) -> None:
        for group_id, hooks in list(self._hooks_elected_leader.items()):
            lead = self._leads.get(group_id)
            if lead is None or lead.lost:
                about = {"member": quote(self._member_id, safe="")}
                lead = self.client.lock(_name("leader", group_id), ttl=self.ttl, metadata=about)
                try:
                    self._leads[group_id] = lead.acquire()
                except errors.LockHeld:
                    continue
                hooks.run(coordination.LeaderElected(group_id, self._member_id))

    def run_watchers(self, timeout: float | None = None) -> list[Any]:
        result: list[Any] = super().run_watchers(timeout)
        self.run_elect_coordinator()
        return result

    @_translated
    def stand_down_group_leader(self, group_id: bytes) -> bool:
        lead = self._leads.pop(group_id, None)
        if lead is None:
            return False
        try:
            lead.release()
        except errors.LockLost:
            return False
        return True

    def get_leader(self, group_id: bytes) -> Any:
        def leader() -> bytes | None:
            held = self.client.get_lock(_name("leader", group_id))
            return unquote_to_bytes(held.metadata["member"]) if held else None

        return self._later(leader)
