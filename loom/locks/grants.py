"""Acquire, renew and release locks, each decided by one function of loom/sql/locks.sql in one round trip; history."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec
import psycopg2

from loom import db, errors, refusals
from loom.db import Connection, Time

COLUMNS = (
    "lock_name, owner, instance_id, fencing_token, acquired_at,"
    " LEAST(expires_at, '9999-12-31 23:59:59.999999+00') AS expires_at, heartbeat_at, metadata"  # by hand, infinity
)


class Grant(msgspec.Struct, frozen=True):
    """One holding of a lock, from `acquired_at` until it ends."""

    lock_name: str
    owner: str
    instance_id: str | None
    fencing_token: int
    acquired_at: Time
    expires_at: Time
    heartbeat_at: Time
    metadata: dict[str, Any]


class PastGrant(Grant, frozen=True):
    """A grant as the history shows it; `ended_at` and `ended_how` are None while it is held."""

    ended_at: Time | None
    ended_how: str | None
    reason: str | None


class Attempt(msgspec.Struct, frozen=True):
    """The result of one call of `acquire`.

    outcome: 'new': a new grant; 'same': the grant that the owner already holds; 'held': another owner's `grant` holds
    the lock; 'promised': the lock is free, but a waiter comes first (`grant` is None).
    waiting: the number of waiters for the lock.
    """

    outcome: str
    grant: Grant | None
    waiting: int

    @property
    def granted(self) -> bool:
        return self.outcome in ("new", "same")


def acquire(
    conn: Connection,
    name: str,
    owner: str,
    ttl: timedelta,
    *,
    instance_id: str | None = None,
    metadata: dict[str, Any] | None = None,
    wait: bool = False,
) -> Attempt:
    """Takes the lock `name` for `owner` if it is free; with `wait`, takes a place in the queue if not.

    An owner that already holds the lock gets its own grant, extended; it never ends earlier than before.
    """
    row = db.row(
        conn,
        "SELECT * FROM acquire_lock(%(name)s, %(owner)s, %(instance)s, %(ttl)s, %(metadata)s, %(wait)s)",
        name=name,
        owner=owner,
        instance=instance_id,
        ttl=ttl,
        metadata=None if metadata is None else json.dumps(metadata),
        wait=wait,
    )
    outcome, waiting = row.pop("outcome"), row.pop("waiting")
    return Attempt(outcome, Grant(**row) if row["lock_name"] is not None else None, waiting)


def renew(conn: Connection, name: str, token: int, ttl: timedelta, *, extend: bool = False) -> Grant:
    """Sets a new end for a grant that we hold, and returns it; with `extend`, the end never moves to an earlier time.

    Raises LockLost when the token is no longer the holder's: expired, taken by another, or forced.
    """
    sql = "SELECT * FROM renew_lock(%(name)s, %(token)s, %(ttl)s, %(extend)s)"
    row = db.one(conn, sql, name=name, token=token, ttl=ttl, extend=extend)
    if row is None:
        raise _lock_lost(conn, name, token)
    return Grant(**row)


def release(conn: Connection, name: str, token: int) -> None:
    """Ends a grant that we hold; may be repeated. Raises LockLost when the grant has ended in any other way."""
    if _end(conn, name, token, "released"):
        return
    past = _past(conn, name, token)
    if past is None or past["ended_how"] != "released":
        raise _lock_lost(conn, name, token, past)


def force_release(conn: Connection, name: str, token: int, reason: str | None = None) -> None:
    """Ends somebody else's grant; may be repeated.

    Raises LockHeld when another grant holds the lock now, NotFound when no such grant is known.
    """
    if _end(conn, name, token, "forced", reason):
        return
    holder = get(conn, name)
    if holder is not None and holder.fencing_token != token:
        raise errors.LockHeld("Another grant holds the lock now.", holder=holder)
    if _past(conn, name, token) is None:
        raise errors.NotFound(refusals.UNKNOWN_GRANT, lock_name=name, fencing_token=token)


def check(conn: Connection, name: str, token: int) -> None:
    """Fences the current transaction of `conn`: its writes commit only while this grant holds the lock.

    Raises LockLost unless the grant is held now. If it is, no later grant can be made before the transaction ends.
    """
    try:
        db.run(conn, "SELECT loom_fence(%(name)s, %(token)s)", name=name, token=token)
    except psycopg2.DatabaseError as exc:
        raise refusals.from_postgres(exc) or exc from exc


def get(conn: Connection, name: str) -> Grant | None:
    """The grant that holds the lock now, or None."""
    row = db.one(
        conn,
        f"SELECT {COLUMNS} FROM distributed_locks WHERE lock_name = %(name)s AND expires_at > clock_timestamp()",
        name=name,
    )
    return None if row is None else Grant(**row)


def waiting(conn: Connection, name: str) -> int:
    """The number of waiters for the lock."""
    return db.value(
        conn,
        "SELECT count(*) FROM lock_waiters WHERE lock_name = %(name)s AND keeps_place(asked_at, clock_timestamp())",
        name=name,
    )


def waiters(conn: Connection, names: Sequence[str], most: int) -> list[db.Row]:
    """Who waits for these locks, first come first: `lock_name`, `owner`, and when it last asked."""
    return db.rows(
        conn,
        """
        SELECT lock_name, owner, asked_at FROM lock_waiters
         WHERE lock_name = ANY (%(names)s) AND keeps_place(asked_at, clock_timestamp()) ORDER BY place LIMIT %(most)s
        """,
        names=list(names),
        most=most,
    )


def held(
    conn: Connection, *, prefix: str = "", owner: str | None = None, after: str = "", limit: int
) -> db.Page[Grant]:
    """The locks that are held, ordered by name; only names after `after`."""
    sql = f"""
        SELECT row_to_json(g)::text FROM (
            SELECT {COLUMNS} FROM distributed_locks
             WHERE expires_at > clock_timestamp() AND lock_name > %(after)s
               AND lock_name >= %(prefix)s AND (%(end)s IS NULL OR lock_name < %(end)s)
               AND (%(owner)s IS NULL OR owner = %(owner)s)
             ORDER BY lock_name LIMIT %(most_rows)s + 1) AS g
        """
    return db.Page(conn, Grant, sql, limit, after=after, prefix=prefix, end=end_of_prefix(prefix), owner=owner)


def end_of_prefix(prefix: str) -> str | None:
    """The first text, by code points, after all texts that begin with the prefix; None if there is none."""
    while prefix:
        last, prefix = ord(prefix[-1]), prefix[:-1]
        if last < sys.maxunicode:
            return prefix + chr(0xE000 if last == 0xD7FF else last + 1)  # between those are no characters
    return None


def history(
    conn: Connection, *, name: str | None = None, owner: str | None = None, before: int | None = None, limit: int
) -> db.Page[PastGrant]:
    """Grants, newest first; only tokens smaller than `before`. A grant past its end is shown as expired."""
    filtered = """
        WHERE (%(name)s IS NULL OR lock_name = %(name)s) AND (%(owner)s IS NULL OR owner = %(owner)s)
          AND (%(before)s IS NULL OR fencing_token < %(before)s)
        ORDER BY fencing_token DESC LIMIT %(most_rows)s + 1"""
    sql = f"""
        SELECT row_to_json(g)::text FROM (
            (SELECT {COLUMNS}, ended_at, ended_how, reason FROM grants {filtered})
            UNION ALL
            (SELECT {COLUMNS}, CASE WHEN expires_at <= clock_timestamp() THEN expires_at END,
                    CASE WHEN expires_at <= clock_timestamp() THEN 'expired' END, NULL
               FROM distributed_locks {filtered})
             ORDER BY fencing_token DESC LIMIT %(most_rows)s + 1) AS g
        """
    return db.Page(conn, PastGrant, sql, limit, name=name, owner=owner, before=before)


def _lock_lost(conn: Connection, name: str, token: int, past: db.Row | None = None) -> errors.Error:
    """LockLost with how and when the grant ended (None: no such grant is known) and who holds the lock now."""
    past = past or _past(conn, name, token) or {"ended_at": None, "ended_how": None}
    return refusals.error(
        "lock-lost",
        {
            "lock_name": name,
            "fencing_token": token,
            "ended_how": past["ended_how"],
            "ended_at": past["ended_at"],
            "holder": get(conn, name),
        },
    )


def _end(conn: Connection, name: str, token: int, how: str, reason: str | None = None) -> bool:
    sql = "SELECT release_lock(%(name)s, %(token)s, %(how)s, %(reason)s)"
    return db.value(conn, sql, name=name, token=token, how=how, reason=reason)


def _past(conn: Connection, name: str, token: int) -> db.Row | None:
    """How and when a grant ended, or None when no such grant is known."""
    return db.one(
        conn,
        """
        SELECT ended_at, ended_how FROM grants WHERE lock_name = %(name)s AND fencing_token = %(token)s
        UNION ALL
        SELECT expires_at, 'expired' FROM distributed_locks
         WHERE lock_name = %(name)s AND fencing_token = %(token)s AND expires_at <= clock_timestamp()
        """,
        name=name,
        token=token,
    )
