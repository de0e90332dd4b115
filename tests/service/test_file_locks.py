"""Two agents never write one file at once, and a lock that was taken for a bead goes with the bead's claim."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import psycopg2.extensions
import pytest
from harness import AppClient, Cluster, wait_until
from harness.client import Answer, Methods
from harness.locks import LOCKS, Sql, acquire, assert_problem, instant, wait_expired
from harness.work import (
    AGENTS,
    BEADS,
    PROJECT,
    bead,
    claim,
    claim_next,
    complete,
    fail,
    lapse,
    make,
    patch,
    release,
    team,
)

from loom.state.file_locks import File

FILE_LOCKS = "/api/v1/file-locks"
KEYS = {"file_path", "project_id", "agent_id", "bead_id", "locked_at", "expires_at"}

Session = Callable[[], psycopg2.extensions.connection]


def ask(client: Methods, path: str, agent: str = "a", **more: Any) -> Answer:
    headers = more.pop("headers", None)
    body = {"file_path": path, "project_id": PROJECT, "agent_id": agent, **more}
    return client.post(FILE_LOCKS, body, headers=headers)


def lock(client: Methods, path: str, agent: str = "a", **more: Any) -> dict[str, Any]:
    answer = ask(client, path, agent, **more)
    assert answer.status in (200, 201), answer
    return answer.json


def unlock(client: Methods, path: str, agent: str = "a", project: str = PROJECT, **more: Any) -> Answer:
    return client.delete(f"{FILE_LOCKS}/{quote(project)}/{quote(path)}?agent_id={quote(agent)}", **more)


def locked(client: Methods, query: str = "") -> list[tuple[str, str]]:
    """The files that are locked, each with its agent."""
    return [(each["file_path"], each["agent_id"]) for each in client.get(FILE_LOCKS + query).json]


def history(client: Methods, path: str) -> list[tuple[str, str | None]]:
    """Who had the file, newest first, and how that ended."""
    name = quote(File(PROJECT, path).lock_name)
    return [(grant["owner"], grant["ended_how"]) for grant in client.get(f"/api/v1/grants?lock_name={name}").json]


@pytest.fixture
def work(client: AppClient) -> AppClient:
    team(client, "a", "b")
    return client


def test_a_file_is_one_agents(work: AppClient) -> None:
    answer = ask(work, "src/main.py", unknown="ignored")
    assert answer.status == 201
    first = answer.json
    assert {*first} == KEYS | {"fencing_token", "lock_name"}
    assert first["lock_name"] == "file:p:src/main.py"
    assert (first["file_path"], first["project_id"], first["agent_id"], first["bead_id"]) == (
        "src/main.py",
        "p",
        "a",
        "",
    )
    assert round((instant(first["expires_at"]) - instant(first["locked_at"])).total_seconds()) == 600
    problem = assert_problem(ask(work, "src/main.py", "b"), 409, "lock-held")
    assert problem["error"] == "file already locked by agent a"
    assert problem["holder"]["metadata"] == {"file_path": "src/main.py", "project_id": "p", "agent_id": "a"}
    assert "fencing_token" not in problem["holder"]
    again = ask(work, "src/main.py")
    assert again.status == 200
    assert again.json["expires_at"] > first["expires_at"]
    assert {**again.json, "expires_at": 0} == {**first, "expires_at": 0}
    assert ask(work, "src/other.py", "b").status == 201
    assert locked(work) == [("src/main.py", "a"), ("src/other.py", "b")]


def test_who_has_a_file_gives_it_back_and_no_other(work: AppClient) -> None:
    lock(work, "x")
    for answer in (unlock(work, "x", "b"), unlock(work, "y"), unlock(work, "x", project="q")):
        assert_problem(answer, 404, "not-found")
    for query in ("", "?agent_id="):
        problem = assert_problem(work.delete(f"{FILE_LOCKS}/p/x{query}"), 400, "invalid")
        assert problem["errors"][0]["field"] == "agent_id"
    assert unlock(work, "x").status == 204
    assert_problem(unlock(work, "x"), 404, "not-found")
    assert ask(work, "x", "b").status == 201
    assert history(work, "x") == [("agent:b", None), ("agent:a", "released")]


def test_a_proxy_may_send_a_release_twice(work: AppClient) -> None:
    lock(work, "x")
    headers = {"Loom-Proxy-Request-ID": "n1"}
    assert unlock(work, "x", headers=headers).status == 204
    assert unlock(work, "x", headers=headers).status == 204
    assert_problem(unlock(work, "x", "b", headers=headers), 404, "not-found")
    lock(work, "x")
    assert unlock(work, "x", headers=headers).status == 204
    assert locked(work) == [("x", "a")], "the request is older than this lock"


def test_a_release_that_presents_its_own_lock_may_be_sent_twice(work: AppClient) -> None:
    token = str(lock(work, "x")["fencing_token"])
    headers = {"Loom-Proxy-Request-ID": "n1", "Loom-Lock-Token": token}
    assert [unlock(work, "x", headers=headers).status for _ in range(2)] == [204, 204]
    assert_problem(unlock(work, "x", headers={"Loom-Lock-Token": token}), 409, "lock-lost")


def test_one_request_id_for_all_that_a_client_does_leaves_no_file_locked(work: AppClient) -> None:
    mine = {"X-Request-ID": "my-whole-work"}
    for _ in range(2):
        lock(work, "x")
        assert unlock(work, "x", headers=mine).status == 204
        assert locked(work) == []
        assert_problem(unlock(work, "x", headers=mine), 404, "not-found")


def test_a_file_lock_ends_by_the_databases_clock(work: AppClient, sql: Sql) -> None:
    first = lock(work, "x")
    sql("UPDATE distributed_locks SET expires_at = clock_timestamp() + interval '1 day'")
    later = lock(work, "x")
    assert later["expires_at"] > first["expires_at"], "asking again never shortens"
    assert sql("SELECT expires_at > clock_timestamp() + interval '23 hours' FROM distributed_locks") == [(True,)]
    sql("UPDATE distributed_locks SET expires_at = clock_timestamp()")
    wait_expired(sql, "file:p:x")
    assert locked(work) == []
    assert_problem(unlock(work, "x"), 404, "not-found")
    taken = lock(work, "x", "b")
    assert taken["fencing_token"] > first["fencing_token"]
    assert history(work, "x") == [("agent:b", None), ("agent:a", "expired")]


def test_the_time_is_that_of_the_settings(start_cluster: Callable[..., Cluster]) -> None:
    one = start_cluster(1, config="agents: {file_lock_timeout: 2}").client(0)
    team(one, "a", "b")
    first = lock(one, "x")
    assert round((instant(first["expires_at"]) - instant(first["locked_at"])).total_seconds()) == 2
    wait_until(lambda: ask(one, "x", "b").status == 201)


def test_one_file_has_one_lock_however_it_is_spelled(work: AppClient) -> None:
    first = lock(work, "./src//a/./b.py")
    assert first["file_path"] == "src/a/b.py"
    for path in ("src/a/b.py", "src/./a//b.py", "src/a/b.py/", "././src/a/b.py"):
        assert_problem(ask(work, path, "b"), 409, "lock-held")
    assert ask(work, "/src/a/b.py", "b").status == 201
    assert lock(work, "cafe\u0301")["file_path"] == "caf\u00e9"
    assert_problem(ask(work, "caf\u00e9", "b"), 409, "lock-held")
    assert unlock(work, "cafe\u0301").status == 204
    assert unlock(work, "src//a/b.py").status == 204
    assert unlock(work, "/src/a/b.py", "b").status == 204


@pytest.mark.parametrize(
    "path",
    ["a b/(c):d.txt", "über/straße.md", "日本/ファイル.py", "a%2Fb", "100%", "🧵", "x" * 250, "ü" * 1000, "a?b#c&d=e"],
)
def test_every_path_can_be_locked_and_released(work: AppClient, path: str) -> None:
    assert lock(work, path)["file_path"] == path
    assert_problem(ask(work, path, "b"), 409, "lock-held")
    assert locked(work) == [(path, "a")]
    assert history(work, path) == [("agent:a", None)]
    answer = work.delete(f"{FILE_LOCKS}/p/{quote(path, safe='')}?agent_id=a")
    assert answer.status == 204
    assert locked(work) == []


def test_two_files_never_share_a_lock(work: AppClient) -> None:
    for project in ("p:a", "p%3Aa", "p%", "sha256", ":"):
        make(work, "/api/v1/projects", id=project, name="n", git_repo="r", branch="b")
    long = "x" * 255
    files = [
        *(("p", path) for path in ("a:b", "a", ":a", "A", "x" * 248, "x" * 249, long, long + "y", "3Aa:b")),
        *(("p:a", "b"), ("p%3Aa", "b"), ("p:a", ":b"), ("p%", "a"), (":", "a"), (":", ":a")),
        *((project, File("p", long).lock_name.rpartition(":")[2]) for project in ("p", "sha256", ":")),
    ]
    for n, (project, path) in enumerate(files):
        assert ask(work, path, "ab"[n % 2], project_id=project).status == 201, (project, path)
    assert len({File(*file).lock_name for file in files}) == len(files)
    assert all(len(File(*file).lock_name) <= 255 for file in files)
    assert sorted((each["project_id"], each["file_path"]) for each in work.get(FILE_LOCKS).json) == sorted(files)
    for n, (project, path) in enumerate(files):
        assert unlock(work, path, "ab"[n % 2], project).status == 204


BAD: list[tuple[str, Any]] = [
    *(
        ("file_path", path)
        for path in (None, "", 7, "/", ".", "../x", "a/../b", "a\nb", "a\x00b", "x" * 2001, "ü" * 1001)
    ),
    *(("project_id", key) for key in (None, "", 7, "none", "a/b", "x" * 201)),
    *(("agent_id", key) for key in (None, "", 7, "nobody", "a/b")),
    *(("bead_id", key) for key in (7, "none", "x" * 201)),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: repr(value)[:12])
def test_bad_input_is_named(work: AppClient, sql: Sql, field: str, value: Any) -> None:
    body = {"file_path": "x", "project_id": "p", "agent_id": "a", field: value}
    problem = assert_problem(work.post(FILE_LOCKS, body), 400, "invalid")
    assert problem["errors"][0]["field"] == field
    assert sql("SELECT 1 FROM distributed_locks") == []


@pytest.mark.parametrize("field", ["file_path", "project_id", "agent_id"])
def test_what_is_missing_is_named(work: AppClient, field: str) -> None:
    body = {"file_path": "x", "project_id": "p", "agent_id": "a"}
    del body[field]
    problem = assert_problem(work.post(FILE_LOCKS, body), 400, "invalid")
    assert problem["errors"][0]["field"] == field


def test_malformed_json_is_told_as_the_original_tells_it(work: AppClient) -> None:
    assert assert_problem(work.post(FILE_LOCKS, b"{"), 400, "invalid")["error"] == "Invalid request body"


@pytest.mark.parametrize(
    "path",
    ["p/%FF", "p/a%0Ab", "p/a%00b", "p/", "p", "", "/x", "p/a/../b", "p/..", "p/.", "a%0Ab/x", "p/" + "x" * 2001],
)
def test_a_path_that_is_none_is_refused(work: AppClient, path: str) -> None:
    assert_problem(work.delete(f"{FILE_LOCKS}/{path}?agent_id=a"), 400, "invalid")


def test_the_list_is_of_a_project_and_in_pages(work: AppClient) -> None:
    make(work, "/api/v1/projects", id="q", name="q", git_repo="r", branch="b")
    paths = [f"f{n}" for n in range(7)]
    for path in paths:
        lock(work, path)
    lock(work, "other", project_id="q")
    acquire(work, "build", metadata={"file_path": "no", "project_id": "p", "agent_id": "a"})
    acquire(work, "file:p:f3x", metadata={"file_path": "no"})
    assert locked(work, "?project_id=q") == [("other", "a")]
    assert locked(work, "?project_id=none") == []
    assert {path for path, _ in locked(work)} == {*paths, "other"}
    found, target = [], f"{FILE_LOCKS}?project_id=p&limit=3"
    while target:
        answer = work.get(target)
        found += [each["file_path"] for each in answer.json]
        target = answer.headers.get("Link", "").partition(">")[0][1:]
    assert found == paths


def test_a_file_lock_is_a_lock_like_any_other(work: AppClient) -> None:
    token = lock(work, "a b")["fencing_token"]
    path = LOCKS + quote("file:p:a b")
    assert work.get(path).json["fencing_token"] == token
    assert_problem(work.post(path, {"owner": "someone"}), 409, "lock-held")
    assert work.put(path, {"fencing_token": token, "ttl_seconds": 900}).status == 200
    assert work.delete(f"{path}?fencing_token={token}").status == 204
    acquire(work, "file:p:a b", owner="someone")
    assert assert_problem(ask(work, "a b"), 409, "lock-held")["error"] == "file already locked by agent someone"


def test_the_file_is_promised_to_who_waits_for_its_lock(work: AppClient, sql: Sql) -> None:
    sql("INSERT INTO lock_waiters (lock_name, owner) VALUES ('file:p:x', 'someone')")
    assert assert_problem(ask(work, "x"), 409, "lock-held")["holder"] is None


def test_a_write_is_fenced_by_a_file_lock(work: AppClient) -> None:
    bead(work, "x")
    first = lock(work, "src/a b")
    headers = {"Loom-Lock-Token": f'{first["fencing_token"]}; lock="file:p:src%2Fa%20b"'}
    assert work.patch(f"{BEADS}/x", {"title": "t"}, headers=headers).status == 200
    assert ask(work, "other", headers=headers).status == 201
    assert ask(work, "src/a b", headers={"Loom-Lock-Token": str(first["fencing_token"])}).status == 200
    unlock(work, "src/a b")
    assert_problem(work.patch(f"{BEADS}/x", {"title": "u"}, headers=headers), 409, "lock-lost")
    assert_problem(ask(work, "more", headers=headers), 409, "lock-lost")
    assert_problem(unlock(work, "other", headers=headers), 409, "lock-lost")
    assert locked(work) == [("other", "a")]


def test_the_key_of_a_file_lock_finds_it_or_says_that_it_is_lost(work: AppClient) -> None:
    headers = {"Idempotency-Key": "k"}
    first = ask(work, "./x", headers=headers)
    again = ask(work, "./x", headers=headers)
    assert (first.status, again.status) == (201, 201)
    assert again.json["fencing_token"] == first.json["fencing_token"]
    assert again.json["expires_at"] > first.json["expires_at"]
    unlock(work, "x")
    lock(work, "x", "b")
    assert_problem(ask(work, "./x", headers=headers), 409, "lock-lost")


def end_by_hand(client: AppClient, sql: Sql, token: int) -> None:
    sql("UPDATE beads SET status = 'open' WHERE id = 'x'")


def end_by_lapse(client: AppClient, sql: Sql, token: int) -> None:
    lapse(sql, "x")
    assert claim_next(client, "b") == "x"


def end_by_silence(client: AppClient, sql: Sql, token: int) -> None:
    sql("UPDATE agents SET status = 'dead' WHERE id = 'a'")


ENDS: dict[str, Callable[[AppClient, Sql, int], Any]] = {
    "completed": lambda client, sql, token: complete(client, "x", token),
    "failed": lambda client, sql, token: fail(client, "x", token),
    "released": lambda client, sql, token: release(client, "x", token),
    "lapsed": end_by_lapse,
    "the agent died": end_by_silence,
    "the agent is gone": lambda client, sql, token: client.delete(f"{AGENTS}/a"),
    "given to another": lambda client, sql, token: patch(client, "x", assigned_to="b"),
    "opened": lambda client, sql, token: patch(client, "x", status="open"),
    "closed": lambda client, sql, token: patch(client, "x", status="closed"),
    "blocked": lambda client, sql, token: patch(client, "x", status="blocked"),
    "redispatched": lambda client, sql, token: client.post(f"{BEADS}/x/redispatch", {}),
    "the bead is gone": lambda client, sql, token: client.delete(f"{BEADS}/x"),
    "by hand": end_by_hand,
}


@pytest.mark.parametrize("how", ENDS)
def test_a_lock_for_a_bead_ends_with_its_claim(work: AppClient, sql: Sql, how: str) -> None:
    bead(work, "x")
    bead(work, "y", priority=3)
    tokens = {key: claim(work, key) for key in "xy"}
    assert lock(work, "of x", bead_id="x")["bead_id"] == "x"
    lock(work, "also of x", bead_id="x")
    lock(work, "of y", bead_id="y")
    lock(work, "of none")
    acquire(work, "build", metadata={"bead_id": "x", "file_path": "no file lock"})
    ENDS[how](work, sql, tokens["x"])
    left = {path for path, _ in locked(work)}
    assert left == {"the agent died": {"of none"}, "the agent is gone": set()}.get(how, {"of y", "of none"})
    assert history(work, "of x") == [("agent:a", "released")]
    assert ask(work, "of x", "b").status == 201
    assert work.get(LOCKS + "build").status == 200


def test_an_expired_lock_has_expired_whatever_becomes_of_its_bead(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    token = claim(work, "x")
    lock(work, "f", bead_id="x")
    sql("UPDATE distributed_locks SET expires_at = clock_timestamp()")
    complete(work, "x", token)
    assert history(work, "f") == [("agent:a", "expired")]


def test_only_who_has_claimed_a_bead_locks_for_it(work: AppClient, sql: Sql) -> None:
    bead(work, "x")
    problem = assert_problem(ask(work, "f", bead_id="x"), 409, "claim-lost", bead_id="x", holder=None)
    assert "claim the bead first" in problem["detail"]
    patch(work, "x", status="in_progress", assigned_to="a")
    assert_problem(ask(work, "f", bead_id="x"), 409, "claim-lost", holder=None)
    patch(work, "x", status="open", assigned_to=None)
    claim(work, "x", "b")
    problem = assert_problem(ask(work, "f", bead_id="x"), 409, "claim-lost")
    assert (problem["holder"]["agent_id"], problem["holder"]["alive"]) == ("b", True)
    assert instant(problem["holder"]["lease_expires_at"])
    assert ask(work, "f", "b", bead_id="x").status == 201
    lapse(sql, "x")
    assert_problem(ask(work, "f", "b", bead_id="x"), 409, "claim-lost", holder=None)


def test_asking_again_without_the_bead_does_not_part_them(work: AppClient) -> None:
    bead(work, "x")
    bead(work, "y")
    tokens = {key: claim(work, key) for key in "xy"}
    lock(work, "f", bead_id="x")
    assert lock(work, "f")["bead_id"] == "x"
    assert lock(work, "f", bead_id="y")["bead_id"] == "y"
    complete(work, "x", tokens["x"])
    assert locked(work) == [("f", "a")]
    complete(work, "y", tokens["y"])
    assert locked(work) == []
    assert lock(work, "f")["bead_id"] == ""


def test_a_claim_cannot_end_while_a_file_is_being_locked_for_it(work: AppClient, sql: Sql, session: Session) -> None:
    bead(work, "x")
    token = claim(work, "x")
    with session() as other, other.cursor() as cursor:
        about = '{"file_path": "f", "project_id": "p", "agent_id": "a", "bead_id": "x"}'
        cursor.execute("SELECT outcome FROM take_file_lock('file:p:f', %s, NULL, '600 s', NULL)", (about,))
        assert cursor.fetchall() == [("new",)]
        late = threading.Thread(target=complete, args=(work, "x", token))
        late.start()
        wait_until(
            lambda: sql("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%end_claim%'")
        )
        assert sql("SELECT status FROM beads WHERE id = 'x'") == [("in_progress",)]
    late.join()
    assert sql("SELECT status FROM beads WHERE id = 'x'") == [("closed",)]
    assert locked(work) == []


def test_no_file_is_locked_for_a_claim_that_is_ending(work: AppClient, sql: Sql, session: Session) -> None:
    bead(work, "x")
    token = claim(work, "x")
    answers = []
    with session() as other, other.cursor() as cursor:
        cursor.execute("SELECT outcome FROM end_claim('x', %s, 'released', NULL, NULL, NULL, NULL)", (token,))
        late = threading.Thread(target=lambda: answers.append(ask(work, "f", bead_id="x")))
        late.start()
        wait_until(
            lambda: sql(
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%take_file_lock%'"
            )
        )
    late.join()
    assert_problem(answers[0], 409, "claim-lost", holder=None)
    assert locked(work) == []


def test_of_many_agents_one_gets_the_file(cluster: Cluster) -> None:
    agents = [f"a{n}" for n in range(8)]
    team(cluster.client(0), *agents)
    for turn in range(20):
        answers: dict[str, Answer] = {}

        def race(n: int, answers: dict[str, Answer] = answers, path: str = f"f{turn}") -> None:
            answers[agents[n]] = ask(cluster.client(n % 3), path, agents[n])

        threads = [threading.Thread(target=race, args=(n,)) for n in range(len(agents))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [agent for agent, answer in answers.items() if answer.status == 201]
        assert len(winners) == 1
        for answer in answers.values():
            assert answer.status == 201 or answer.json["error"] == f"file already locked by agent {winners[0]}"


STRAY = """
    SELECT lock_name, metadata ->> 'bead_id' FROM distributed_locks l
     WHERE expires_at > clock_timestamp() AND NOT EXISTS (
         SELECT 1 FROM beads b WHERE b.id = metadata ->> 'bead_id' AND b.fencing_token IS NOT NULL
            AND l.owner = 'agent:' || b.assigned_to)
"""


def test_no_lock_outlives_the_claim_that_it_was_taken_for(cluster: Cluster, sql: Sql, seed: int, long: bool) -> None:
    agents = [f"a{n}" for n in range(4)]
    team(cluster.client(0), *agents)
    for n in range(4):
        bead(cluster.client(0), f"b{n}")
    until, answers = time.monotonic() + (60 if long else 6), []

    def work(agent: str, client: Methods, pick: random.Random) -> None:
        """Claims a bead, locks files for it, and gives it back."""
        while time.monotonic() < until:
            key = f"b{pick.randrange(4)}"
            claimed = client.post(f"{BEADS}/{key}/claim", {"agent_id": agent})
            if claimed.status == 200:
                answers.extend(ask(client, f"f{pick.randrange(8)}", agent, bead_id=key) for _ in range(4))
                answers.append(fail(client, key, claimed.json["fencing_token"], retry_after_seconds=0))

    def disturb(client: Methods, pick: random.Random) -> None:
        """Takes beads away."""
        while time.monotonic() < until:
            patch(client, f"b{pick.randrange(4)}", status="open")

    cast = [(work, agent, cluster.client(n % 3), random.Random(seed + n)) for n, agent in enumerate(agents)]
    threads = [threading.Thread(target=each[0], args=each[1:]) for each in cast]
    threads += [threading.Thread(target=disturb, args=(cluster.client(n), random.Random(n))) for n in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert sql(STRAY) == []
        time.sleep(0.1)
    seen = Counter(answer.status for answer in answers)
    assert {*seen} <= {200, 201, 409}, seen
    assert seen[201] > 50, "the storm has locked files"
    assert [answer for answer in answers if answer.status == 409 and answer.json["type"] == "/problems/claim-lost"]
