"""The history of grants: whatever an operator or a fault does, each grant has its end there."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg2.extensions
import pytest
from harness import AppClient, wait_until
from harness.locks import BUILD, LOCKS, Sql, acquire, assert_lost, force, instant, release, wait_expired
from harness.postgres import binaries

from loom import db, instances, locks

Psql = Callable[[str], str]

KEYS = ["lock_name", "owner", "instance_id", "fencing_token", "acquired_at", "expires_at", "heartbeat_at", "metadata"]
KEYS += ["principal", "ended_at", "ended_how", "reason"]

# The guide's queries, to the letter.
ACTIVE_INSTANCES = "SELECT * FROM instances WHERE last_heartbeat > NOW() - INTERVAL '60 seconds';"
ACTIVE_LOCKS = """
-- View active locks
SELECT * FROM distributed_locks 
WHERE expires_at > NOW()
ORDER BY acquired_at;
"""  # noqa: W291
CLEAN_UP_LOCKS = """
-- Clean up expired locks
DELETE FROM distributed_locks 
WHERE expires_at < NOW();
"""  # noqa: W291
ALL_INSTANCES = """
-- View all instances
SELECT * FROM instances 
ORDER BY last_heartbeat DESC;
"""  # noqa: W291
REMOVE_INSTANCES = """
-- Remove stale instances (no heartbeat for 5 minutes)
DELETE FROM instances 
WHERE last_heartbeat < NOW() - INTERVAL '5 minutes';
"""  # noqa: W291
SPLIT_BRAIN = """
-- Check for multiple instances claiming same operation
SELECT lock_name, COUNT(*) as instances
FROM distributed_locks
GROUP BY lock_name
HAVING COUNT(*) > 1;
"""


@pytest.fixture
def psql(dsn: str) -> Psql:
    """Run statements in psql, and return what it prints."""

    def run(text: str) -> str:
        command = [str(binaries() / "psql"), "-X", "-A", "-v", "ON_ERROR_STOP=1", "-d", dsn]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout

    return run


def history(client: AppClient, query: str = "lock_name=build") -> list[dict[str, Any]]:
    answer = client.get(f"/api/v1/grants?{query}")
    assert answer.status == 200
    return answer.json


def test_a_held_lock_is_in_the_history_without_an_end(client: AppClient) -> None:
    grant = acquire(client, owner="a", metadata={"n": 1})
    (row,) = history(client)
    assert list(row) == KEYS
    assert row == {**grant, "principal": "local", "ended_at": None, "ended_how": None, "reason": None}


def test_a_released_grant_keeps_all_its_fields(client: AppClient) -> None:
    grant = acquire(client, owner="a", metadata={"n": 1})
    renewed = client.put(BUILD, {"fencing_token": grant["fencing_token"], "ttl_seconds": 60}).json
    release(client, grant["fencing_token"])
    (row,) = history(client)
    ended = {"ended_at": row["ended_at"], "ended_how": "released", "reason": None}
    assert row == {**renewed, "principal": "local", **ended}
    assert instant(renewed["heartbeat_at"]) <= instant(row["ended_at"]) < instant(renewed["expires_at"])


def test_an_expired_grant_ended_at_its_expiry_however_its_row_was_removed(
    client: AppClient, sql: Sql, psql: Psql
) -> None:
    ways: dict[str, Callable[[str], object]] = {
        "nobody": lambda name: None,
        "next owner": lambda name: acquire(client, name, owner="b"),
        "guide's delete": lambda name: psql(CLEAN_UP_LOCKS),
        "delete": lambda name: sql("DELETE FROM distributed_locks WHERE lock_name = %s", name),
        "truncate": lambda name: sql("TRUNCATE distributed_locks"),
    }
    for name, clean_up in ways.items():
        grant = acquire(client, name, owner="a", ttl_seconds=1)
        wait_expired(sql, name)
        clean_up(name)
        row = history(client, f"lock_name={name}")[-1]
        assert (row["ended_how"], row["ended_at"]) == ("expired", grant["expires_at"]), name


def test_a_forced_end_keeps_its_reason(client: AppClient) -> None:
    token = acquire(client)["fencing_token"]
    force(client, token, more="&reason=deploy%20is%20stuck%20%E2%80%93%20Eve")
    (row,) = history(client)
    assert (row["ended_how"], row["reason"]) == ("forced", "deploy is stuck – Eve")
    assert row["ended_at"] < row["expires_at"]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM distributed_locks WHERE lock_name = 'build'",
        "TRUNCATE distributed_locks",
        "TRUNCATE distributed_locks RESTART IDENTITY CASCADE",
    ],
)
def test_a_row_removed_by_hand_is_a_forced_end_and_its_holder_is_told(
    client: AppClient, sql: Sql, statement: str
) -> None:
    grant = acquire(client, owner="a")
    acquire(client, "other", owner="a")
    sql(statement)
    (row,) = history(client)
    assert (row["ended_how"], row["reason"]) == ("forced", None)
    assert grant["acquired_at"] < row["ended_at"] < grant["expires_at"]
    assert_lost(client.put(BUILD, {"fencing_token": grant["fencing_token"]}), "forced")
    assert_lost(release(client, grant["fencing_token"]), "forced")
    assert client.get(BUILD).status == 404, "the renewal did not revive it"
    assert acquire(client, owner="a")["fencing_token"] > grant["fencing_token"]


def test_a_grant_whose_history_was_removed_is_not_said_never_to_have_existed(client: AppClient, sql: Sql) -> None:
    token = acquire(client)["fencing_token"]
    assert release(client, token).status == 204
    sql("DELETE FROM grants")
    told = {release(client, token).json["detail"], force(client, token).json["detail"]}
    assert told == {"No such grant is known: it was never made, or its history was removed."}


def test_a_release_that_starts_in_time_is_not_recorded_as_expired_when_it_takes_long(
    client: AppClient, sql: Sql
) -> None:
    """Otherwise the holder is answered 204, and its retry lock-lost."""
    sql("CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1.1); RETURN OLD; END'")
    sql("CREATE TRIGGER linger BEFORE DELETE ON distributed_locks FOR EACH ROW EXECUTE FUNCTION linger()")
    grant = acquire(client, owner="a", ttl_seconds=1)
    assert [release(client, grant["fencing_token"]).status for _ in range(2)] == [204, 204]
    (row,) = history(client)
    assert (row["ended_how"], row["ended_at"]) == ("released", grant["expires_at"])


def test_a_release_does_not_change_how_a_later_end_in_its_transaction_is_recorded(
    client: AppClient, session: Callable[[], psycopg2.extensions.connection]
) -> None:
    first, second = acquire(client, "one")["fencing_token"], acquire(client, "two")["fencing_token"]
    with session() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT release_lock('one', %s, 'released', 'a reason')", (first,))
        cursor.execute("DELETE FROM distributed_locks WHERE fencing_token = %s", (second,))
    (row,) = history(client, "lock_name=two")
    assert (row["ended_how"], row["reason"]) == ("forced", None)


@pytest.mark.parametrize(
    "fault",
    [
        "UPDATE instances SET status = 'dead' WHERE instance_id = %s",
        "DELETE FROM instances WHERE instance_id = %s",
    ],
)
def test_the_own_locks_of_an_instance_end_with_it(
    database: db.Database, sql: Sql, client: AppClient, fault: str
) -> None:
    me, other = str(uuid.uuid4()), str(uuid.uuid4())
    with database.connection() as conn:
        for one in (me, other):
            db.run(conn, "SELECT register_instance(%(id)s, 'host', '{}')", id=one)
            locks.acquire(conn, f"of {one}", f"instance:{one}", timedelta(minutes=1), instance_id=one)
        locks.acquire(conn, "of a client", "a", timedelta(minutes=1), instance_id=me)
        locks.acquire(conn, "over", f"instance:{me}", timedelta(milliseconds=1), instance_id=me)
    wait_expired(sql, "over")
    sql(fault, me)
    ends = {row["lock_name"]: row["ended_how"] for row in history(client, "")}
    assert ends == {f"of {me}": "owner-died", f"of {other}": None, "of a client": None, "over": "expired"}


def test_the_own_locks_of_an_instance_are_released_when_it_leaves(
    database: db.Database, client: AppClient, instance: instances.Instance
) -> None:
    owner = f"instance:{instance.instance_id}"
    with database.connection() as conn:
        locks.acquire(conn, "own", owner, timedelta(minutes=1), instance_id=instance.instance_id)
    acquire(client, "a client's", owner="a")
    instance.leave()
    ends = {row["lock_name"]: row["ended_how"] for row in history(client, "")}
    assert ends == {"own": "released", "a client's": None}


def test_the_history_is_newest_first_and_can_be_filtered_by_name_and_owner(client: AppClient) -> None:
    for name, owner in (("one", "a"), ("two", "a"), ("one", "b"), ("two", "b"), ("one", "a")):
        release(client, acquire(client, name, owner=owner)["fencing_token"], name)
    acquire(client, "two", owner="a")

    def found(query: str) -> list[tuple[str, str]]:
        return [(row["lock_name"], row["owner"]) for row in history(client, query)]

    assert found("lock_name=one") == [("one", "a"), ("one", "b"), ("one", "a")]
    assert found("owner=b") == [("two", "b"), ("one", "b")]
    assert found("lock_name=two&owner=a") == [("two", "a"), ("two", "a")]
    assert found("lock_name=on") == []
    tokens = [row["fencing_token"] for row in history(client, "")]
    assert tokens == sorted(tokens, reverse=True)
    assert len(tokens) == 6


def test_pages_of_the_history_give_every_grant_once(client: AppClient) -> None:
    tokens = []
    for i in range(8):  # the odd ones stay held
        tokens.append(acquire(client, f"lock {i}", owner="a b")["fencing_token"])
        if i % 2 == 0:
            release(client, tokens[-1], f"lock {i}")
    path, seen = "/api/v1/grants?limit=3&owner=a%20b", []
    while path:
        answer = client.get(path)
        seen += [row["fencing_token"] for row in answer.json]
        path = answer.headers.get("Link", "").partition("<")[2].partition(">")[0]
    assert seen == tokens[::-1]


def test_the_guides_queries_work_as_written(
    client: AppClient, psql: Psql, sql: Sql, instance: instances.Instance
) -> None:
    acquire(client, "old", owner="a", ttl_seconds=1)
    acquire(client, "held", owner="b")
    wait_expired(sql, "old")
    silent = str(uuid.uuid4())
    sql("SELECT register_instance(%s, 'host', '{}')", silent)
    sql("UPDATE instances SET last_heartbeat = NOW() - INTERVAL '6 minutes' WHERE instance_id = %s", silent)

    header, *rows = psql(ACTIVE_LOCKS).splitlines()[:-1]
    assert header == "lock_name|instance_id|owner|fencing_token|acquired_at|expires_at|heartbeat_at|metadata|principal"
    assert [row.split("|")[0] for row in rows] == ["held"]
    assert psql(CLEAN_UP_LOCKS).strip() == "DELETE 1"
    assert psql(SPLIT_BRAIN).splitlines() == ["lock_name|instances", "(0 rows)"]
    header, *rows = psql(ALL_INSTANCES).splitlines()[:-1]
    assert header.startswith("instance_id|hostname|started_at|last_heartbeat|status|metadata")
    assert [row.split("|")[0] for row in rows] == [instance.instance_id, silent]
    assert [line.split("|")[0] for line in psql(ACTIVE_INSTANCES).splitlines()[1:-1]] == [instance.instance_id]
    assert psql(REMOVE_INSTANCES).strip() == "DELETE 1"
    assert [row[0] for row in sql("SELECT instance_id::text FROM instances")] == [instance.instance_id]
    assert client.get(LOCKS + "held").json["owner"] == "b"


def test_the_guides_deletes_under_load_break_no_promise(
    database: db.Database, client: AppClient, psql: Psql, sql: Sql
) -> None:
    """Holders that renew in time lose nothing, and every grant has its end."""
    until = time.monotonic() + 3

    def work(number: int) -> int:
        rounds = 0
        while time.monotonic() < until:
            name, ttl = f"lock-{number % 4}", timedelta(seconds=5)
            with database.connection() as conn:
                got = locks.acquire(conn, name, f"owner {number}", ttl)
                if got.granted and got.grant is not None:
                    locks.renew(conn, name, got.grant.fencing_token, ttl)
                    locks.release(conn, name, got.grant.fencing_token)
                    rounds += 1
                locks.acquire(conn, f"forgotten {number} {rounds}", "nobody", timedelta(milliseconds=1))
        return rounds

    with ThreadPoolExecutor(8) as threads:
        working = [threads.submit(work, i) for i in range(8)]
        while time.monotonic() < until:
            psql(CLEAN_UP_LOCKS + REMOVE_INSTANCES)
        assert sum(future.result() for future in working) > 50
    wait_until(lambda: psql(CLEAN_UP_LOCKS).strip() and not sql("SELECT 1 FROM distributed_locks"))
    assert sql("SELECT count(*) FROM grants WHERE ended_how NOT IN ('released', 'expired')") == [(0,)]
    first, last = sql("SELECT min(fencing_token), max(fencing_token) FROM grants")[0]
    assert sql("SELECT count(*) FROM grants") == [(last - first + 1,)], "a grant has no end"
    assert len(client.get("/api/v1/instances").json) == 1


def test_a_transaction_that_fails_leaves_neither_grant_nor_history(database: db.Database, sql: Sql) -> None:
    def fail() -> None:
        with database.transaction() as conn:
            got = locks.acquire(conn, "build", "a", timedelta(minutes=1))
            assert got.grant is not None
            locks.release(conn, "build", got.grant.fencing_token)
            locks.acquire(conn, "other", "a", timedelta(minutes=1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert sql("SELECT 1 FROM distributed_locks UNION ALL SELECT 1 FROM grants") == []
