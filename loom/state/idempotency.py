"""What requests with an Idempotency-Key were answered, so that a retry is answered the same and applied once."""

from __future__ import annotations

import hashlib
import uuid

import msgspec

from loom import db, errors
from loom.db import Connection


class Asked(msgspec.Struct, frozen=True):
    """A request with a key. `fingerprint` tells it from others that came with the same one: all that it says."""

    key: str
    method: str
    path: str
    caller: str
    fingerprint: bytes

    @property
    def scope(self) -> str:
        """A UUID: the same for every retry of this request, and for nothing else."""
        named = msgspec.json.encode((self.key, self.method, self.path, self.caller))
        return str(uuid.UUID(bytes=hashlib.sha256(named).digest()[:16]))


class Answer(msgspec.Struct, frozen=True):
    """What was answered, byte for byte."""

    status: int
    headers: dict[str, str]
    body: bytes


def find(conn: Connection, asked: Asked, *, wait: bool = False) -> Answer | None:
    """What this request was answered before, or None. Its twins cannot look until the transaction of `conn` ends.

    `wait` for a twin that is in flight. Raises InProgress without it, KeyReused when the key came with another request.
    """
    row = db.one(conn, "SELECT * FROM find_answer(%(scope)s::uuid, %(wait)s)", scope=asked.scope, wait=wait)
    if row is None:
        return None
    if row["in_progress"]:
        raise errors.InProgress()
    if bytes(row["fingerprint"]) != asked.fingerprint:
        raise errors.KeyReused()
    return Answer(row["status"], row["headers"], bytes(row["body"]))


def keep_and_commit(conn: Connection, asked: Asked, answer: Answer) -> None:
    """Keeps the answer with what the transaction did, which this ends; it is the transaction of `find`."""
    conn.execute(
        """
        INSERT INTO idempotency_keys (scope, key, method, path, caller, fingerprint, status, headers, body)
        VALUES (%(scope)s, %(key)s, %(method)s, %(path)s, %(caller)s, %(fingerprint)s,
                %(status)s, %(headers)s, %(body)s)
        """,
        {
            "scope": asked.scope,
            **msgspec.structs.asdict(asked),
            **msgspec.structs.asdict(answer),
            "headers": msgspec.json.encode(answer.headers).decode(),
        },
        commit=True,
    )
