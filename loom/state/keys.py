"""API keys: who acts with one, and what an instance knows of them without asking the database for each request."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from datetime import timedelta
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from loom import db, errors
from loom.db import Time

Role = Literal["reader", "agent", "admin"]

# No slash, since it stands before an owner's name in the queues for locks; and what no key may claim to be.
RESERVED = ("system:", "sql:", "local", "anonymous")
Principal = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f/]+$(?!\n)")]
Seconds = Annotated[int, Meta(ge=1, le=10 * 366 * 86400)]

PREFIX = "loom_"
FORM = re.compile(f"{PREFIX}([0-9a-f]{{16}})_[0-9a-f]{{64}}")
TRUST = 6.0  # seconds: so long after a key was revoked, no instance takes it any longer
LOOKS_PER_SECOND = 20  # of an instance at keys that it does not know: guessing must not load the database
OVERLAP = timedelta(days=1)  # for which a key that was rotated remains valid
MOST = 10_000  # valid keys, since each instance knows them all

# A clock that counts through sleep: an instance that was suspended must not trust what it knew before.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_COLUMNS = "id, principal, role, note, created_at, created_by, expires_at, revoked_at, revoked_by, last_used_at"
_NOBODY = bytes(32)  # is compared with the hash of an unknown key


class ApiKey(msgspec.Struct):
    """A key as it is listed."""

    id: str
    principal: Principal
    role: Role
    note: str
    created_at: Time
    created_by: str
    expires_at: Time | None
    revoked_at: Time | None
    revoked_by: str | None
    last_used_at: Time | None


class CreatedKey(ApiKey):
    """A key when it is created: the one time that the key itself is shown."""

    key: str


class Valid(msgspec.Struct, frozen=True):
    """What an instance knows of a valid key."""

    id: str
    principal: str
    role: Role
    hash: str


class _Read(msgspec.Struct):
    state: str
    keys: list[Valid]


class Keys:
    """The valid keys, as an instance knows them. The heartbeat brings what has changed. For several threads."""

    def __init__(self) -> None:
        self.state: str | None = None
        self._known: dict[str, tuple[bytes, Valid]] = {}
        self._read_at = float("-inf")
        self._reading = threading.Lock()
        self._looks, self._looks_since = 0, 0.0
        self._used: set[str] = set()

    def learn(self, read: Any, sent: float) -> None:
        """Takes what valid_keys() returned for `self.state`. `sent`: of now(), when it was asked."""
        if read is not None:
            found = msgspec.convert(read, _Read)
            self._known = {key.id: (bytes.fromhex(key.hash), key) for key in found.keys}
            self.state = found.state
        self._read_at = sent

    def find(self, text: str) -> Valid | None:
        """The valid key that this text is, or None.

        It asks the database only if what is known is too old, or if the key is not known: it may be new. Raises
        Unavailable, and Busy if that happens too often.
        """
        if now() - self._read_at > TRUST:
            self._refresh(TRUST)
        key = self._match(text)
        if key is None and FORM.fullmatch(text):
            self._count_look()
            self._refresh(0)
            key = self._match(text)
        if key is not None:
            self._used.add(key.id)
        return key

    def find_known(self, text: str) -> Valid | None:
        """Like find(), but never asks the database: for what must be answered without it."""
        return self._match(text) if now() - self._read_at <= TRUST else None

    def take_used(self) -> list[str]:
        """The keys that were used since the last call."""
        used, self._used = self._used, set()
        return list(used)

    def _match(self, text: str) -> Valid | None:
        form = FORM.fullmatch(text)
        expected, key = self._known.get(form[1] if form else "", (_NOBODY, None))
        given = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        return key if hmac.compare_digest(given, expected) else None

    def _count_look(self) -> None:
        second = float(int(now()))
        if second != self._looks_since:
            self._looks, self._looks_since = 0, second
        self._looks += 1
        if self._looks > LOOKS_PER_SECOND:
            raise errors.Busy("Too many unknown keys are being looked up.")

    def _refresh(self, oldest: float) -> None:
        """Reads the keys, unless another thread has just done so: what is known is then not older than that."""
        wanted = now() - oldest
        if not self._reading.acquire(timeout=max(0.0, db.default().request_deadline - time.monotonic())):
            raise errors.Busy("The keys cannot be read in time.")
        try:
            if self._read_at < wanted:
                sent = now()
                with db.connection() as conn:
                    self.learn(db.value(conn, "SELECT valid_keys(%(known)s)", known=self.state), sent)
        finally:
            self._reading.release()


def now() -> float:
    return time.clock_gettime(_CLOCK)


def create(
    conn: db.Connection,
    principal: str,
    role: Role,
    *,
    by: str | None,
    note: str = "",
    lifetime: timedelta | None = None,
) -> CreatedKey:
    """Creates a key. `by`: who creates it, by default the user of the database. Raises Invalid."""
    if principal.startswith(RESERVED[:2]) or principal in RESERVED:
        raise errors.Invalid.field("principal", f"must not be, or begin with, one of {', '.join(RESERVED)}")
    if db.value(conn, "SELECT count(*) >= %(most)s FROM api_keys k WHERE is_valid(k)", most=MOST):
        raise errors.Conflict(f"There are {MOST} valid keys: revoke some first.")
    key_id = secrets.token_hex(8)
    key = f"{PREFIX}{key_id}_{secrets.token_hex(32)}"
    row = db.row(
        conn,
        f"""
        INSERT INTO api_keys (id, principal, role, hash, note, expires_at, created_by)
        VALUES (%(id)s, %(principal)s, %(role)s, %(hash)s, %(note)s, clock_timestamp() + %(lifetime)s,
                COALESCE(%(by)s, 'sql:' || session_user)) RETURNING {_COLUMNS}
        """,
        id=key_id,
        principal=principal,
        role=role,
        hash=hashlib.sha256(key.encode()).digest(),
        note=note,
        lifetime=lifetime,
        by=by,
    )
    return CreatedKey(**row, key=key)


def rotate(conn: db.Connection, key_id: str, *, by: str | None, overlap: timedelta = OVERLAP) -> CreatedKey:
    """Creates another key of the same principal and role. The old one remains valid for `overlap`. Raises NotFound.

    Call it in a transaction.
    """
    old = get(conn, key_id)
    if not db.value(conn, "SELECT is_valid(k) FROM api_keys k WHERE id = %(id)s", id=key_id):
        raise errors.Conflict("The key is not valid any longer: create a new one.")
    new = create(conn, old.principal, old.role, by=by, note=old.note)
    revoke(conn, key_id, by=by, after=overlap)
    return new


def revoke(
    conn: db.Connection, key_id: str, *, by: str | None, after: timedelta = timedelta(0), keeps_admin: bool = False
) -> None:
    """Ends a key, at once or after a time; may be repeated.

    `keeps_admin`: not the last valid key of an administrator. Raises NotFound, LastAdminKey.
    """
    outcome = db.value(
        conn,
        "SELECT revoke_key(%(id)s, %(by)s, %(after)s, %(keeps_admin)s)",
        id=key_id,
        by=by,
        after=after,
        keeps_admin=keeps_admin,
    )
    if outcome == "not-found":
        raise errors.NotFound("There is no such key.", id=key_id)
    if outcome == "last-admin-key":
        raise errors.LastAdminKey("Create another key with the role admin first, or use `loom keys revoke`.")


def get(conn: db.Connection, key_id: str) -> ApiKey:
    row = db.one(conn, f"SELECT {_COLUMNS} FROM api_keys WHERE id = %(id)s", id=key_id)
    if row is None:
        raise errors.NotFound("There is no such key.", id=key_id)
    return ApiKey(**row)


def some(conn: db.Connection, *, after: str, limit: int) -> db.Page[ApiKey]:
    """All keys, in the order of their ids; only those after `after`."""
    sql = f"""
        SELECT row_to_json(k)::text FROM (
            SELECT {_COLUMNS} FROM api_keys WHERE id > %(after)s ORDER BY id LIMIT %(most_rows)s + 1) AS k
        """
    return db.Page(conn, ApiKey, sql, limit, after=after)
