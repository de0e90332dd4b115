"""A lock has one holder, and every answer about it is true: acquire, renew, release, force, inspect, list."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from urllib.parse import quote

import pytest
from harness import AppClient
from harness.locks import (
    BUILD,
    LOCKS,
    Sql,
    acquire,
    assert_lost,
    assert_problem,
    force,
    instant,
    release,
    seconds,
    wait_expired,
)

from loom import db, errors, instances, locks

KEYS = ["lock_name", "owner", "instance_id", "fencing_token", "acquired_at", "expires_at", "heartbeat_at", "metadata"]
GOOD_NAMES = [
    "my-operation",
    "grants",
    "a/history",
    "a/b/c",
    "bead:bd-1 (draft)",
    "with spaces",
    "plus+plus & half;semi?what#hash=1",
    "100%25",
    "ü/ß/Ж/好/🔒",
    "...",
    ".hidden/..also",
    "\u2028line separator",
    "\\back'slash\"quote",
    "ü" * 255,
    "🔒" * 255,
]
BAD_NAMES = {
    "": "nothing",
    "%20%0A": "a line feed",
    "a%00b": "NUL",
    "a%7Fb": "DEL",
    "a%C2%85b": "a control character beyond ASCII",
    "a%09": "a tab",
    "u%CC%88": "a letter and its diaeresis as two characters",
    "/a": "a leading slash",
    "%2Fa": "a leading slash, encoded",
    "a/": "a trailing slash",
    "a//b": "a doubled slash",
    "a%2F%2Fb": "a doubled slash, encoded",
    ".": "a dot",
    "..": "two dots",
    "a/./b": "a dot between slashes",
    "a/../b": "two dots between slashes",
    "a%2F..%2Fb": "two dots between encoded slashes",
    "%FF": "a byte that is never UTF-8",
    "%C3%28": "a broken sequence",
    "%ED%A0%80": "half a surrogate pair",
    "%C0%AF": "an overlong slash",
    "%F5%80%80%80": "beyond Unicode",
    "a%C3": "half a character",
    "x" * 256: "256 characters",
}


# Acquire


def test_a_new_grant_is_answered_with_all_its_fields(client: AppClient, instance: instances.Instance) -> None:
    answer = client.post(BUILD, {"owner": "a", "ttl_seconds": 60, "metadata": {"why": "release"}})
    grant = answer.json
    assert answer.status == 201
    assert list(grant) == KEYS
    assert (grant["lock_name"], grant["owner"], grant["metadata"]) == ("build", "a", {"why": "release"})
    assert grant["instance_id"] == instance.instance_id
    assert isinstance(grant["fencing_token"], int)
    assert grant["acquired_at"] == grant["heartbeat_at"]
    assert seconds(grant) == 60


def test_without_a_body_the_owner_is_generated_and_the_ttl_is_30_seconds(client: AppClient) -> None:
    first, second = client.post(LOCKS + "one"), client.post(LOCKS + "two", b"")
    assert (first.status, second.status) == (201, 201)
    assert len(first.json["owner"]) == 36
    assert first.json["owner"] != second.json["owner"]
    assert seconds(first.json) == 30
    assert first.json["metadata"] == {}


def test_an_owner_that_acquires_again_gets_the_grant_it_already_holds(client: AppClient) -> None:
    first = acquire(client, owner="a", ttl_seconds=100)
    again = client.post(BUILD, {"owner": "a", "ttl_seconds": 200})
    assert again.status == 200
    assert again.json["fencing_token"] == first["fencing_token"]
    assert again.json["acquired_at"] == first["acquired_at"]
    assert seconds(again.json) == 200


def test_acquiring_again_never_shortens_the_grant(client: AppClient) -> None:
    first = acquire(client, owner="a", ttl_seconds=100)
    assert acquire(client, owner="a", ttl_seconds=1)["expires_at"] == first["expires_at"]


def test_acquiring_again_changes_metadata_only_when_it_is_given(client: AppClient) -> None:
    acquire(client, owner="a", metadata={"step": 1})
    assert acquire(client, owner="a")["metadata"] == {"step": 1}
    assert acquire(client, owner="a", metadata={"step": 2})["metadata"] == {"step": 2}
    assert acquire(client, owner="a", metadata={})["metadata"] == {}


def test_another_owner_is_refused_and_told_the_holder(client: AppClient) -> None:
    mine = acquire(client, owner="a")
    answer = client.post(BUILD, {"owner": "b"})
    problem = assert_problem(answer, 409, "lock-held", waiting=0)
    assert answer.headers["Retry-After"] == "1"
    assert problem["holder"] == {name: value for name, value in mine.items() if name != "fencing_token"}


def test_a_refused_request_is_told_its_generated_owner(client: AppClient) -> None:
    acquire(client, owner="a")
    assert client.post(BUILD).json["owner"], "otherwise it could not keep its place in the queue"


def test_an_owner_that_acquires_again_after_expiry_gets_a_new_grant(client: AppClient, sql: Sql) -> None:
    first = acquire(client, owner="a", ttl_seconds=1)
    wait_expired(sql)
    again = client.post(BUILD, {"owner": "a"})
    assert again.status == 201
    assert again.json["fencing_token"] > first["fencing_token"]
    assert instant(again.json["acquired_at"]) >= instant(first["expires_at"])


def test_an_expired_lock_is_free_for_another(client: AppClient, sql: Sql) -> None:
    first = acquire(client, owner="a", ttl_seconds=1)
    wait_expired(sql)
    assert acquire(client, owner="b")["fencing_token"] > first["fencing_token"]
    assert_lost(client.put(BUILD, {"fencing_token": first["fencing_token"]}), "expired", "b")


@pytest.mark.parametrize("ttl", [1, 86400])
def test_the_shortest_and_the_longest_ttl_are_kept_exactly(client: AppClient, ttl: int) -> None:
    grant = acquire(client, ttl_seconds=ttl)
    assert seconds(grant) == ttl
    renewed = client.put(BUILD, {"fencing_token": grant["fencing_token"], "ttl_seconds": ttl})
    assert seconds(renewed.json) == ttl


def test_a_client_cannot_acquire_a_lock_as_an_instance(client: AppClient, instance: instances.Instance) -> None:
    answer = client.post(BUILD, {"owner": f"instance:{instance.instance_id}"})
    assert assert_problem(answer, 400, "invalid")["errors"][0]["field"] == "owner"
    assert client.get(BUILD).status == 404


# Renew


def test_a_renewal_sets_a_new_end_and_may_shorten_the_grant(client: AppClient) -> None:
    grant = acquire(client, owner="a", ttl_seconds=60, metadata={"kept": True})
    longer = client.put(BUILD, {"fencing_token": grant["fencing_token"], "ttl_seconds": 600})
    assert longer.status == 200
    assert list(longer.json) == KEYS
    assert seconds(longer.json) == 600
    shorter = client.put(BUILD, {"fencing_token": grant["fencing_token"], "ttl_seconds": 5}).json
    assert seconds(shorter) == 5
    assert instant(shorter["expires_at"]) < instant(grant["expires_at"])
    assert (shorter["acquired_at"], shorter["metadata"]) == (grant["acquired_at"], {"kept": True})
    assert seconds(client.put(BUILD, {"fencing_token": grant["fencing_token"]}).json) == 30, "the default"


def test_a_released_grant_cannot_be_renewed(client: AppClient) -> None:
    token = acquire(client)["fencing_token"]
    release(client, token)
    assert_lost(client.put(BUILD, {"fencing_token": token}), "released")
    assert client.get(BUILD).status == 404, "renewal never inserts"


def test_an_expired_grant_cannot_be_renewed_even_if_the_lock_is_free(client: AppClient, sql: Sql) -> None:
    grant = acquire(client, ttl_seconds=1)
    wait_expired(sql)
    problem = assert_lost(client.put(BUILD, {"fencing_token": grant["fencing_token"]}), "expired")
    assert problem["ended_at"] == grant["expires_at"]
    assert client.get(BUILD).status == 404


def test_an_unknown_token_renews_and_releases_nothing(client: AppClient) -> None:
    token = acquire(client, owner="a")["fencing_token"]
    for name, other in (("build", token + 1), ("build", 2**53 - 1), ("other", token)):
        holder = "a" if name == "build" else None
        assert_lost(client.put(LOCKS + name, {"fencing_token": other}), None, holder)
        assert_lost(release(client, other, name), None, holder)
    assert client.get(BUILD).json["fencing_token"] == token


# Release


def test_a_release_may_be_repeated_after_a_lost_answer(client: AppClient) -> None:
    token = acquire(client, owner="a")["fencing_token"]
    for _ in range(3):
        answer = release(client, token)
        assert (answer.status, answer.body) == (204, b"")
    acquire(client, owner="b")
    assert release(client, token).status == 204, "without ending the next owner's grant"
    assert client.get(BUILD).json["owner"] == "b"


def test_a_holder_that_lost_the_lock_is_told_when_it_releases(client: AppClient, sql: Sql) -> None:
    expired = acquire(client, "expired", owner="a", ttl_seconds=1)["fencing_token"]
    forced = acquire(client, "forced", owner="a")["fencing_token"]
    force(client, forced, "forced")
    wait_expired(sql, "expired")
    assert_lost(release(client, expired, "expired"), "expired")
    assert_lost(release(client, forced, "forced"), "forced")
    acquire(client, "expired", owner="b")
    assert_lost(release(client, expired, "expired"), "expired", "b")


# Force-release


def test_a_forced_lock_is_free_and_its_holder_is_told(client: AppClient) -> None:
    token = acquire(client, owner="a")["fencing_token"]
    assert force(client, token).status == 204
    assert_lost(client.put(BUILD, {"fencing_token": token}), "forced")
    assert client.post(BUILD, {"owner": "b"}).status == 201


def test_a_forced_release_may_be_repeated(client: AppClient) -> None:
    token = acquire(client)["fencing_token"]
    assert [force(client, token).status for _ in range(3)] == [204] * 3


def test_a_forced_release_of_an_expired_grant_succeeds(client: AppClient, sql: Sql) -> None:
    token = acquire(client, ttl_seconds=1)["fencing_token"]
    wait_expired(sql)
    assert force(client, token).status == 204


def test_a_forced_release_does_not_end_the_next_grant(client: AppClient) -> None:
    first = acquire(client, owner="a")["fencing_token"]
    release(client, first)
    second = acquire(client, owner="b")
    problem = assert_problem(force(client, first), 409, "lock-held")
    assert problem["holder"]["owner"] == "b"
    assert "fencing_token" not in problem["holder"]
    assert client.get(BUILD).json["fencing_token"] == second["fencing_token"]


def test_a_forced_release_of_an_unknown_grant_is_404(client: AppClient) -> None:
    assert_problem(force(client, 1, "never-held"), 404, "not-found")


@pytest.mark.parametrize("query", ["", "?force=true", "?force=true&reason=x", "?fencing_token="])
def test_a_release_without_a_token_is_refused(client: AppClient, query: str) -> None:
    token = acquire(client)["fencing_token"]
    problem = assert_problem(client.delete(BUILD + query), 400, "invalid")
    assert problem["errors"][0]["field"] == "fencing_token"
    assert client.get(BUILD).json["fencing_token"] == token


# Inspect and list


def test_inspection_shows_the_grant_and_the_number_of_waiters(client: AppClient) -> None:
    grant = acquire(client, owner="a")
    assert client.get(BUILD).json == {**grant, "waiting": 0}


def test_a_free_lock_is_404_also_while_its_expired_row_exists(client: AppClient, sql: Sql) -> None:
    assert_problem(client.get(BUILD), 404, "not-found")
    acquire(client, ttl_seconds=1)
    wait_expired(sql)
    assert_problem(client.get(BUILD), 404, "not-found")
    assert client.get("/api/v1/locks").json == []


def test_the_list_has_the_held_locks_in_the_order_of_their_names(client: AppClient) -> None:
    for name in ("b", "a", "B", "ü", "a/b", "a_c", "axc", "a%c"):
        acquire(client, name, owner="odd" if name in "bü" else "even")
    listed = client.get("/api/v1/locks").json
    assert [grant["lock_name"] for grant in listed] == ["B", "a", "a%c", "a/b", "a_c", "axc", "b", "ü"]
    assert list(listed[0]) == KEYS

    def names(query: str) -> list[str]:
        return [grant["lock_name"] for grant in client.get("/api/v1/locks?" + query).json]

    assert names("prefix=a_") == ["a_c"], "a prefix is no pattern"
    assert names("prefix=a%25") == ["a%c"]
    assert names("prefix=%C3%BC") == ["ü"]
    assert names("owner=odd") == ["b", "ü"]
    assert names("owner=odd&prefix=b") == ["b"]
    assert names("owner=nobody") == []


def test_pages_give_every_lock_once(client: AppClient) -> None:
    wanted = [f"lock/{i:02} ü" for i in range(7)]
    for name in wanted:
        acquire(client, name, owner="a b")
    acquire(client, "other")
    path, seen = "/api/v1/locks?limit=3&prefix=lock%2F&owner=a+b", []
    for _ in range(3):
        answer = client.get(path)
        seen += [grant["lock_name"] for grant in answer.json]
        link = answer.headers.get("Link", "")
        path = link.partition("<")[2].partition(">")[0]
        assert link.endswith('; rel="next"') == (len(seen) < 7)
    assert seen == wanted
    assert path == ""


# Names


def test_every_allowed_name_names_its_own_lock(client: AppClient) -> None:
    for name in GOOD_NAMES:
        path = LOCKS + quote(name, safe="")
        answer = client.post(path, {"owner": "a"})
        assert (answer.status, answer.json["lock_name"]) == (201, name)
        assert client.get(LOCKS + quote(name)).json["lock_name"] == name, "an encoded slash equals a plain one"
        token = answer.json["fencing_token"]
        assert client.put(path, {"fencing_token": token}).json["lock_name"] == name
        grants = client.get("/api/v1/grants?lock_name=" + quote(name, safe="")).json
        assert [grant["lock_name"] for grant in grants] == [name]
        assert client.delete(f"{path}?fencing_token={token}").status == 204


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "GET"])
def test_a_bad_name_is_refused_and_never_becomes_another(client: AppClient, sql: Sql, method: str) -> None:
    query = "?fencing_token=1" if method == "DELETE" else ""
    body = {"fencing_token": 1} if method == "PUT" else None
    for raw, problem in BAD_NAMES.items():
        answer = client.request(method, LOCKS + raw + query, body)
        assert assert_problem(answer, 400, "invalid")["errors"][0]["field"] == "lock_name", problem
    assert sql("SELECT lock_name FROM distributed_locks") == []


def test_names_that_look_alike_are_different_locks(client: AppClient) -> None:
    names = ["u", "ü", "Ü", "build", "Build", "build ", "%2F", "a/b", "a%2Fb", "\ufffd"]
    for name in names:
        assert client.post(LOCKS + quote(name)).status == 201
    assert sorted(grant["lock_name"] for grant in client.get("/api/v1/locks").json) == sorted(names)


# One holder


def test_one_of_many_simultaneous_requests_gets_the_lock(client: AppClient) -> None:
    with ThreadPoolExecutor(16) as threads:
        for name in ("a", "b", "c"):
            answers = list(threads.map(lambda i, name=name: client.post(LOCKS + name, {"owner": f"o{i}"}), range(16)))
            assert sorted(answer.status for answer in answers) == [201] + [409] * 15
            holder = next(answer.json["owner"] for answer in answers if answer.status == 201)
            assert {a.json["holder"]["owner"] for a in answers if a.status == 409} == {holder}


def test_no_two_grants_of_a_lock_ever_overlap(database: db.Database, sql: Sql, seed: int, long: bool) -> None:
    """Random owners, TTLs of milliseconds, rows deleted by hand meanwhile: checked in the history."""
    until = time.monotonic() + (60 if long else 4)
    told: list[tuple[int, str]] = []  # how each grant ended, as its holder was told

    def live(number: int) -> None:
        dice = random.Random(seed + number)
        while time.monotonic() < until:
            name, ttl = f"lock-{dice.randrange(2)}", timedelta(milliseconds=dice.choice((5, 20, 100)))
            with database.connection() as conn:
                got = locks.acquire(conn, name, f"owner-{number}-{dice.random()}", ttl)
            if not got.granted or got.grant is None:
                continue
            token = got.grant.fencing_token
            try:
                for _ in range(dice.randrange(3)):
                    time.sleep(dice.random() * 0.02)  # the work
                    with database.connection() as conn:
                        locks.renew(conn, name, token, ttl)
                with database.connection() as conn:
                    locks.release(conn, name, token)
                told.append((token, "released"))
            except errors.LockLost as exc:
                told.append((token, exc.members["ended_how"]))

    def delete_by_hand() -> None:
        dice = random.Random(seed)
        statements = (
            "DELETE FROM distributed_locks WHERE expires_at < NOW()",
            "DELETE FROM distributed_locks WHERE lock_name = 'lock-0'",
            "TRUNCATE distributed_locks RESTART IDENTITY",
        )
        while time.monotonic() < until:
            with database.connection() as conn:
                db.run(conn, dice.choice(statements))
            time.sleep(0.03)

    threads = [threading.Thread(target=live, args=(i,)) for i in range(6)] + [threading.Thread(target=delete_by_hand)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    sql("DELETE FROM distributed_locks")
    history = sql("SELECT lock_name, fencing_token, acquired_at, ended_at, ended_how FROM grants ORDER BY 1, 2")
    assert len(history) > 100
    for one, following in pairwise(history):
        if one[0] == following[0]:
            assert one[3] <= following[2], f"{one} overlaps {following} (seed {seed})"
    ends = {token: how for _, token, _, _, how in history}
    assert {(token, ends[token]) for token, _ in told} == set(told), "each holder was told what the history has"
    assert {how for _, how in told} == {"released", "expired", "forced"}


@pytest.mark.parametrize("prefix", ["a", "a\uffff", "a\U0010ffff", "a\ud7ff", "\U0010ffff", "\U0010ffff" * 2])
def test_a_prefix_finds_every_name_that_begins_with_it(client: AppClient, prefix: str) -> None:
    """Also one that goes on with the last character that there is."""
    names = {prefix, *(prefix + more for more in ("\U0010ffff", "\U0010ffffx", "\ud7ff", "\ue000", "b", "/c"))}
    others = {"Z", "b", "a\U0010fffe", "\U0010fffe", "b\U0010ffff"}
    for name in names | others:
        client.post(LOCKS + quote(name), {})
    found = {lock["lock_name"] for lock in client.get(f"/api/v1/locks?prefix={quote(prefix)}").json}
    assert found == {name for name in names | others if name.startswith(prefix)}
