"""Promise 6: who follows the cursor sees every event once, whatever commits in whatever order."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from flask import Flask
from harness import MARGIN, AppClient, Cluster, wait_until
from harness.feed import FEED, Event, assert_in_order, differences, follow, read, replay
from harness.locks import LOCKS, Sql, assert_problem, instant

from loom import db
from loom.config import Config, DatabaseConfig, ServerConfig
from loom.instances import Instance
from loom.routes import create_app
from loom.state import events
from loom.upkeep import Upkeep

Session = Callable[[], psycopg2.extensions.connection]

PROJECT = "INSERT INTO projects (id, name) VALUES ('p', 'P') ON CONFLICT DO NOTHING"
BEADS = "INSERT INTO beads (id, title, project_id) SELECT 'bd-' || i, 'T', 'p' FROM generate_series(%s, %s) AS i"


@pytest.fixture(autouse=True)
def project(sql: Sql) -> None:
    sql(PROJECT)


@pytest.fixture
def cursor(client: AppClient) -> int:
    """The end of the feed when the test begins."""
    return read(client, None)[1]


def ids(found: list[Event]) -> list[str]:
    return [event["entity_id"] for event in found]


def test_an_event_says_who_changed_what(client: AppClient, cursor: int, instance: Instance) -> None:
    headers = {"Loom-Actor": "ann", "X-Request-ID": "r-1"}
    bead = client.post("/api/v1/beads", {"title": "Paint", "project_id": "p", "priority": 1}, headers=headers).json
    client.request("PATCH", f"/api/v1/beads/{bead['id']}", {"priority": 0}, headers=headers)
    (made, changed), on = read(client, cursor)
    assert (made["type"], made["version"], changed["type"], changed["version"]) == (
        "bead.created", 1, "bead.updated", 2)  # fmt: skip
    for event in (made, changed):
        assert (event["entity_type"], event["entity_id"], event["project_id"]) == ("bead", bead["id"], "p")
        assert (event["actor"], event["request_id"]) == ("ann", "r-1")
        assert event["instance_id"] == event["source"] == instance.instance_id
        assert cursor < event["id"] < 2**53
    assert instant(made["timestamp"]) == instant(bead["updated_at"])
    assert (made["changes"]["title"], made["changes"]["priority"]) == ("Paint", 1)
    assert changed["changes"] == {"priority": 0}
    assert changed["data"] == {"bead_id": bead["id"], "project_id": "p"}
    assert on == changed["id"]


def test_a_time_is_written_as_its_entity_has_it(client: AppClient, cursor: int, sql: Sql) -> None:
    due = "2027-01-01T00:00:00.12+01:00"
    made = [
        client.post("/api/v1/beads", {"id": "bd-1", "title": "T", "project_id": "p", "due_date": due}),
        client.patch("/api/v1/beads/bd-1", {"status": "closed"}),
        client.patch("/api/v1/projects/p", {"last_sync_at": due, "due_date": due, "status": "closed"}),
        client.post("/api/v1/agents", {"id": "a", "persona_name": "x", "project_id": "p"}),
        client.post("/api/v1/providers", {"id": "v", "name": "v", "last_heartbeat_at": due}),
    ]
    found, _ = read(client, cursor)
    for event, answer in zip(found, made, strict=True):
        times = {name: value for name, value in answer.json.items() if name in events.TIMES & event["changes"].keys()}
        assert times
        assert {name: event["changes"][name] for name in times} == times
    sql("UPDATE beads SET closed_at = 'infinity' WHERE id = 'bd-1'")
    assert read(client, found[-1]["id"])[0][0]["changes"] == {"closed_at": "infinity"}


def test_what_is_a_time_of_an_entity_is_one_in_its_events(sql: Sql) -> None:
    rows = sql(
        """
        SELECT DISTINCT c.column_name FROM information_schema.triggered_update_columns u
          JOIN information_schema.columns c ON (c.table_name, c.column_name) = (event_object_table, event_object_column)
         WHERE trigger_name = 'entity_updated' AND data_type LIKE 'timestamp%%'
        """
    )
    # Which alone make no version; the last two are only in the event of an import.
    assert {name for (name,) in rows} | {"not_before"} | {"updated_at", "last_active"} == events.TIMES


def test_a_change_by_hand_is_an_event_too(client: AppClient, cursor: int, sql: Sql) -> None:
    sql("UPDATE projects SET description = 'by hand'")
    (event,), _ = read(client, cursor)
    assert (event["type"], event["changes"]) == ("project.updated", {"description": "by hand"})
    assert (event["actor"], event["instance_id"], event["source"]) == (
        sql("SELECT 'sql:' || session_user")[0][0],
        None,
        "loom",
    )


def test_the_oldest_the_latest_and_all_between(client: AppClient, sql: Sql) -> None:
    sql(BEADS, 1, 250)
    first, on = read(client, 0)
    assert ids(first) == ["p", *(f"bd-{i}" for i in range(1, 100))]
    second, _ = read(client, on, limit=2)
    assert ids(second) == ["bd-100", "bd-101"]
    assert ids(list(follow(client, limit=33))) == ["p", *(f"bd-{i}" for i in range(1, 251))]
    latest, end = read(client, None, limit=2)
    assert ids(latest) == ["bd-249", "bd-250"], "oldest first"
    assert ids(read(client, None)[0]) == [f"bd-{i}" for i in range(151, 251)]
    assert end == latest[-1]["id"]
    assert read(client, end) == ([], end)


def test_an_empty_feed_can_be_followed(client: AppClient, sql: Sql) -> None:
    sql("TRUNCATE events")
    assert read(client, 0) == ([], 0)
    found, on = read(client, None)
    assert found == []
    sql(BEADS, 1, 1)
    assert ids(read(client, on)[0]) == ["bd-1"]


def test_filters(client: AppClient, cursor: int, sql: Sql) -> None:
    sql("INSERT INTO projects (id, name) VALUES ('q', 'Q')")
    sql("INSERT INTO beads (id, title, project_id) VALUES ('bd-1', 'T', 'q'), ('bd-2', 'T', 'p')")
    sql("UPDATE beads SET title = 'U' WHERE id = 'bd-1'")
    sql("UPDATE beads SET title = 'U' WHERE id = 'bd-2'")
    assert ids(read(client, cursor, project_id="q")[0]) == ["q", "bd-1", "bd-1"]
    assert ids(read(client, cursor, type="bead.updated")[0]) == ["bd-1", "bd-2"]
    assert [e["version"] for e in read(client, cursor, entity_id="bd-2")[0]] == [1, 2]
    assert ids(read(client, cursor, entity_id="bd-2", type="bead.created", project_id="p")[0]) == ["bd-2"]
    assert ids(read(client, None, project_id="q", limit=1)[0]) == ["bd-1"]
    end = read(client, None)[1]
    assert read(client, cursor, type="bead.deleted") == ([], end), "what did not match is not looked at again"
    assert read(client, None, type="bead.deleted") == ([], end)
    assert read(client, cursor, project_id="", type="")[1] == end, "as none at all"


def test_a_filter_looks_at_a_bounded_number_of_events_a_request(client: AppClient, cursor: int, sql: Sql) -> None:
    sql(BEADS, 1, 25_000)
    sql("UPDATE projects SET description = 'at last'")
    steps = [cursor]
    while True:
        found, on = read(client, steps[-1], entity_id="p")
        if found or on == steps[-1]:
            break
        steps.append(on)
    assert ids(found) == ["p"]
    assert [b - a for a, b in itertools.pairwise(steps)] == [events.SCAN] * 2
    assert ids(read(client, cursor, entity_id="p", wait_seconds=5)[0]) == ["p"], "who waits need not ask again"
    assert sql(POLLS) == [], "nor does it wait for what is there"
    assert read(client, None, type="project.created")[0] == []


def test_bad_input_is_named(client: AppClient) -> None:
    for field, values in {
        "after": ("-1", "x", "1.0", str(2**53), ""),
        "limit": ("0", "1001", "x", ""),
        "wait_seconds": ("-1", "26", "0.5"),
        "type": ("%00", "x" * 256),
        "entity_id": ("%0A",),
        "project_id": ("%1F",),
    }.items():
        for value in values:
            problem = assert_problem(client.get(f"{FEED}?{field}={value}"), 400, "invalid")
            assert [error["field"] for error in problem["errors"]] == [field], (field, value)
    assert client.get(FEED + "/stats").status == 404
    assert client.post(FEED, {}).status == 405


def test_what_commits_late_comes_late(client: AppClient, cursor: int, sql: Sql, session: Session) -> None:
    with session() as conn, conn.cursor() as held:
        held.execute(BEADS, (1, 2))
        sql(BEADS, 3, 4)
        found, on = read(client, cursor)
        assert ids(found) == ["bd-3", "bd-4"]
        sql(BEADS, 5, 5)
        assert ids(read(client, on)[0]) == ["bd-5"]
        for _ in range(3):
            on = read(client, on)[1]
    assert ids(read(client, on)[0]) == ["bd-1", "bd-2"]
    assert ids(list(follow(client, cursor))) == ["bd-3", "bd-4", "bd-5", "bd-1", "bd-2"]


def test_what_is_rolled_back_never_comes_and_is_not_looked_for_for_ever(
    client: AppClient, cursor: int, sql: Sql, session: Session
) -> None:
    for i in range(10):
        conn = session()
        conn.cursor().execute(BEADS, (1, 3))
        conn.rollback()
        sql(BEADS, 10 + i, 10 + i)
    assert ids(list(follow(client, cursor))) == [f"bd-{10 + i}" for i in range(10)]
    wait_until(lambda: read(client) and sql("SELECT count(*) FROM event_gaps") == [(1,)])


def test_an_open_transaction_keeps_its_place_open(client: AppClient, cursor: int, sql: Sql, session: Session) -> None:
    with session() as conn, conn.cursor() as held:
        held.execute(BEADS, (1, 1))
        for i in range(2, 8):
            sql(BEADS, i, i)
            read(client)
        assert sql("SELECT last - first FROM event_gaps ORDER BY first")[0] == (0,)
    assert ids(list(follow(client, cursor)))[-1] == "bd-1"


def test_a_transaction_that_began_later_and_inserted_earlier(
    client: AppClient, cursor: int, sql: Sql, session: Session
) -> None:
    """When the other is numbered, no snapshot shows that this one is under way: it has not come so far."""
    with session() as earlier, session() as later, earlier.cursor() as first, later.cursor() as second:
        first.execute("SELECT txid_current()")
        second.execute(BEADS, (1, 1))
        first.execute(BEADS, (2, 2))
        earlier.commit()
        for _ in range(3):
            read(client)
    assert ids(list(follow(client, cursor))) == ["bd-2", "bd-1"]


def test_while_another_numbers_a_reader_does_not_wait(
    client: AppClient, cursor: int, sql: Sql, session: Session
) -> None:
    sql(BEADS, 1, 2)
    with session() as conn, conn.cursor() as other:
        other.execute("SELECT number_events(1)")
        sql(BEADS, 3, 3)
        assert read(client, cursor) == ([], cursor)
    assert ids(list(follow(client, cursor, limit=1))) == ["bd-1", "bd-2", "bd-3"]


def test_a_reader_that_is_frozen_while_it_takes_its_page_keeps_nobody_from_numbering(
    client: AppClient, cursor: int, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be for minutes that a server waits to be rid of an answer."""
    halfway = threading.Event()
    execute = db.Connection.execute

    def slow(self: db.Connection, text: str, *more: Any, **options: Any) -> list[db.Row]:
        if "FROM feed" in text and not halfway.is_set():
            text = text.replace("FROM here", "FROM (SELECT pg_sleep(2)) AS slow, here")
            halfway.set()
        return execute(self, text, *more, **options)

    monkeypatch.setattr(db.Connection, "execute", slow)
    with ThreadPoolExecutor(1) as threads:
        frozen = threads.submit(read, client, cursor)
        assert halfway.wait(5)
        sql(BEADS, 1, 1)
        assert ids(read(client, cursor)[0]) == ["bd-1"]
        assert not frozen.done()


def test_a_backlog_is_numbered_in_batches(database: db.Database, cursor: int, client: AppClient, sql: Sql) -> None:
    sql(BEADS, 1, 30)
    for left in (20, 10, 0):
        assert sql("SELECT number_events(10)") == [(10,)]
        assert sql("SELECT count(*) FROM events WHERE place NOT IN (SELECT place FROM event_numbers)") == [(left,)]
    assert sql("SELECT number_events(10)") == [(0,)]
    with database.connection() as conn:
        assert not events.number(conn)
    found = list(follow(client, cursor))
    assert ids(found) == [f"bd-{i}" for i in range(1, 31)]
    assert [e["id"] - found[0]["id"] for e in found] == list(range(30)), "without a gap"


def test_a_place_is_drawn_by_a_transaction_that_has_an_id(sql: Sql, client: AppClient) -> None:
    """Else it could be forgotten as a gap that nobody will fill."""
    sql(
        """
        CREATE FUNCTION draw() RETURNS bigint LANGUAGE plpgsql AS $$
        BEGIN
            ASSERT txid_current_if_assigned() IS NOT NULL;
            RETURN nextval('places');
        END $$
        """
    )
    sql("ALTER TABLE events ALTER place DROP IDENTITY")
    sql("CREATE SEQUENCE places")
    sql("ALTER TABLE events ALTER place SET DEFAULT draw()")
    sql("SELECT setval('places', (SELECT max(place) FROM events))")
    sql(BEADS, 1, 3)
    sql("UPDATE beads SET priority = 0 WHERE id = 'bd-1'")
    sql("UPDATE beads SET version = 7 WHERE id = 'bd-1'")
    sql("UPDATE beads SET blocked_by = '{bd-2}' WHERE id = 'bd-1'")
    sql("INSERT INTO agents (id, name) VALUES ('a', 'A') ON CONFLICT (id) DO UPDATE SET name = 'B'")
    sql("INSERT INTO agents (id, name) VALUES ('a', 'A') ON CONFLICT (id) DO UPDATE SET name = 'B'")
    sql("INSERT INTO config (key, value) VALUES ('k', '1')")
    assert client.post("/api/v1/beads/claim", {"agent_id": "a"}).status == 200
    assert client.request("PATCH", "/api/v1/beads/bd-3", {"title": "U"}).status == 200
    sql("DELETE FROM agents")
    sql("DELETE FROM beads WHERE id = 'bd-2'")


class Writer:
    """Changes beads in transactions of its own, some of them long and some rolled back."""

    def __init__(self, dsn: str, seed: str, over: threading.Event) -> None:
        self.dsn, self.random, self.over, self.committed = dsn, random.Random(seed), over, 0

    def run(self) -> None:
        conn = psycopg2.connect(self.dsn)
        while not self.over.is_set():
            try:
                with conn, conn.cursor() as cursor:
                    for bead in sorted(self.random.sample(range(40), self.random.randint(1, 4))):
                        self.change(cursor, f"bd-{bead}")
                        self.over.wait(self.random.choice((0, 0, 0, 0, 0.001, 0.01)))
                    self.over.wait(self.random.choice((0, 0, 0, 0, 0, 0, 0.02, 0.3)))
                    if self.random.random() < 0.2:
                        conn.rollback()
            except psycopg2.errors.DeadlockDetected:
                pass
        conn.close()

    def change(self, cursor: psycopg2.extensions.cursor, bead: str) -> None:
        cursor.execute(
            "INSERT INTO beads (id, title, project_id) VALUES (%s, 'T', 'p') ON CONFLICT (id) DO NOTHING", (bead,)
        )
        what = self.random.choices(("SET", "DELETE"), (9, 1))[0]
        if what == "DELETE":
            cursor.execute("DELETE FROM beads WHERE id = %s", (bead,))
        else:
            tag, priority = f"t{self.random.randrange(5)}", self.random.randrange(4)
            cursor.execute("UPDATE beads SET tags = %s, priority = %s WHERE id = %s", ([tag], priority, bead))


class Follower:
    """Follows the feed over a pool of its own, as another instance would."""

    def __init__(self, dsn: str, seed: str) -> None:
        self.database, self.random, self.seen, self.at = db.Database(dsn), random.Random(seed), list[events.Event](), 0

    def run(self, over: threading.Event) -> None:
        self.database.open()
        wait_until(lambda: self.database.usage()["open"] > 0)
        while True:
            last = over.is_set()
            self.database.start_request()
            with self.database.connection() as conn:
                page = events.read(conn, self.at, self.random.choice((1, 3, 20, 1000)))
            self.seen += page.events
            if last and self.at == page.next == page.last:
                break
            self.at = page.next
            time.sleep(self.random.choice((0, 0, 0.01, 0.1)))
        self.database.close()


def test_every_reader_sees_every_event_once_whatever_commits_in_whatever_order(
    dsn: str, client: AppClient, sql: Sql, seed: int, long: bool
) -> None:
    read(client)  # notices that this database is a copy
    writing, reading = threading.Event(), threading.Event()
    writers = [Writer(dsn, f"{seed}/w{i}", writing) for i in range(8)]
    followers = [Follower(dsn, f"{seed}/f{i}") for i in range(4)]
    with ThreadPoolExecutor(13) as threads:
        writes = [threads.submit(writer.run) for writer in writers]
        reads = [threads.submit(follower.run, reading) for follower in followers]
        waits = threads.submit(wait_for_all, client, reading)
        time.sleep(60 if long else 5)
        writing.set()
        for task in writes:
            task.result(30)
        sql("SELECT number_events()")
        reading.set()
        for task in reads:
            task.result(30)
        waited = waits.result(30)
    everything = list(follow(client))
    assert len(everything) == sql("SELECT count(*) FROM events")[0][0]
    late = sql(
        "SELECT count(*) FROM feed f WHERE EXISTS (SELECT 1 FROM feed g WHERE g.id < f.id AND g.place > f.place)"
    )
    print(f"{len(everything)} events, {late[0][0]} of them committed after a later one had been numbered")
    assert late[0][0] > 10
    assert_in_order(everything)
    assert [e["id"] - everything[0]["id"] for e in everything] == list(range(len(everything))), "without a gap"
    for follower in followers:
        assert [e.id for e in follower.seen] == [e["id"] for e in everything]
    assert waited == everything
    for bead in client.get("/api/v1/beads").json:
        assert differences(replay(everything)["bead", bead["id"]], bead) == {}


def wait_for_all(client: AppClient, over: threading.Event) -> list[Event]:
    """Follows the feed by waiting."""
    seen, after = list[Event](), 0
    while True:
        last = over.is_set()
        found, on = read(client, after, wait_seconds=1, limit=1000)
        seen += found
        if last and on == after:
            return seen
        after = on


Wait = Callable[..., "Future[tuple[list[Event], int]]"]

POLLS = (
    "SELECT state_change FROM pg_stat_activity WHERE application_name = 'loom events' AND datname = current_database()"
)


@pytest.fixture
def wait(client: AppClient, sql: Sql) -> Iterator[Wait]:
    """Reads on a thread."""
    with ThreadPoolExecutor(8) as threads:
        yield lambda after, by=client, seconds=20, **query: threads.submit(
            read, by, after, wait_seconds=seconds, **query
        )


def test_who_waits_is_told_soon_after_the_commit(client: AppClient, cursor: int, sql: Sql, wait: Wait) -> None:
    delays = []
    for i in range(10):
        waiting = wait(cursor)
        wait_until(lambda: sql(POLLS))
        time.sleep(0.3)
        assert not waiting.done()
        sql(BEADS, i, i)
        committed = time.monotonic()
        found, cursor = waiting.result(5)
        delays.append(time.monotonic() - committed)
        assert ids(found) == [f"bd-{i}"]
    assert max(delays) < 1 + MARGIN
    assert sorted(delays)[5] < 0.75


def test_who_waits_in_vain_is_told_after_the_time_it_gave(client: AppClient, cursor: int) -> None:
    started = time.monotonic()
    assert read(client, cursor, wait_seconds=1) == ([], cursor)
    assert 0.9 < time.monotonic() - started < 3


def test_who_waits_with_a_filter_waits_for_what_matches(client: AppClient, cursor: int, sql: Sql, wait: Wait) -> None:
    waiting = wait(cursor, project_id="q")
    sql(BEADS, 1, 20)
    time.sleep(0.5)
    assert not waiting.done()
    sql("INSERT INTO projects (id, name) VALUES ('q', 'Q')")
    assert ids(waiting.result(5)[0]) == ["q"]
    assert read(client, cursor, project_id="never", wait_seconds=1) == ([], read(client, None)[1])


def test_one_poll_serves_all_and_none_is_made_while_nobody_waits(
    client: AppClient, cursor: int, sql: Sql, wait: Wait
) -> None:
    waiting = [wait(cursor) for _ in range(6)]
    wait_until(lambda: sql(POLLS))
    assert len(sql(POLLS)) == 1
    sql(BEADS, 1, 1)
    for one in waiting:
        assert ids(one.result(5)[0]) == ["bd-1"]
    quiet = sql(POLLS)
    sql("SELECT pg_sleep(1)")
    assert sql(POLLS) == quiet


def test_a_reader_whose_client_hung_up_leaves(app: Flask, cursor: int, wait: Wait) -> None:
    near, far = socket.socketpair()
    with near, far:
        waiting = wait(cursor, AppClient(app, far))
        time.sleep(0.3)
        near.close()
        assert waiting.result(10) == ([], cursor)


def test_who_waits_at_an_instance_that_drains_is_told_at_once(
    client: AppClient, cursor: int, instance: Instance, wait: Wait
) -> None:
    waiting = wait(cursor)
    time.sleep(0.3)
    instance.drain()
    assert waiting.result(10) == ([], cursor)
    assert read(client, cursor, wait_seconds=20) == ([], cursor)


def test_readers_that_wait_take_no_thread(start_cluster: Callable[..., Cluster], sql: Sql) -> None:
    """Five times as many as there are threads: none is sent away, and other requests are answered at once."""
    cluster = start_cluster(1)
    _, cursor = read(cluster.client(), None)
    with ThreadPoolExecutor(40) as threads:
        asked = f"{FEED}?after={cursor}&wait_seconds=20"
        readers = [threads.submit(cluster.client().get, asked) for _ in range(40)]
        wait_until(lambda: sql("SELECT 1 FROM pg_stat_activity WHERE application_name LIKE 'loom:%%events'"))
        client, worst = cluster.client(), 0.0
        for i in range(50):
            started = time.monotonic()
            assert client.post(f"{LOCKS}l{i}", {"owner": "o"}).status == 201
            worst = max(worst, time.monotonic() - started)
        assert not any(reader.done() for reader in readers)
        sql(BEADS, 1, 1)
        answers = [reader.result(10) for reader in readers]
    assert all(len(answer.json["events"]) == 1 and "Retry-After" not in answer.headers for answer in answers)
    assert worst < 1 + MARGIN


def test_readers_leave_room_for_who_waits_for_a_lock(dsn: str, app: Flask, cursor: int, sql: Sql, wait: Wait) -> None:
    """Of four threads two may wait, and one of those for events."""
    config = Config(database=DatabaseConfig(type="postgres", dsn=dsn), server=ServerConfig(threads=4))
    client = AppClient(create_app(config))
    held = client.post(LOCKS + "build", {"owner": "holder"}).json
    inside = wait(cursor, client)
    wait_until(lambda: sql(POLLS))
    refused = client.get(f"{FEED}?after={cursor}&wait_seconds=20")
    assert (refused.json, refused.headers["Retry-After"]) == ({"events": [], "count": 0, "next": cursor}, "1")
    with ThreadPoolExecutor(1) as threads:
        body = {"owner": "waiter", "wait_seconds": 20}
        waiting = threads.submit(client.post, LOCKS + "build", body)
        wait_until(lambda: sql("SELECT 1 FROM lock_waiters"))
        started = time.monotonic()
        assert client.post(LOCKS + "build", {"owner": "another", "wait_seconds": 20}).status == 409
        assert time.monotonic() - started < 10, "there is no room for a third"
        client.delete(f"{LOCKS}build?fencing_token={held['fencing_token']}")
        assert waiting.result(5).status == 201
    assert not inside.done()
    sql(BEADS, 1, 1)
    assert ids(inside.result(5)[0]) == ["bd-1"]


def age(sql: Sql, days: float, where: str) -> None:
    sql(f"UPDATE events SET timestamp = clock_timestamp() - %s WHERE {where}", timedelta(days=days))


@pytest.fixture
def keeper(instance: Instance) -> Upkeep:
    return Upkeep(Config(), instance)


def test_upkeep_numbers_what_nobody_reads(sql: Sql, keeper: Upkeep) -> None:
    sql(BEADS, 1, 10)
    keeper.clean()
    assert sql("SELECT count(*) FROM feed") == sql("SELECT count(*) FROM events")


def test_old_events_go_and_their_readers_are_told(client: AppClient, sql: Sql, keeper: Upkeep) -> None:
    sql(BEADS, 1, 3000)
    everything = list(follow(client, limit=1000))
    age(sql, 30.1, "place <= (SELECT place FROM events WHERE entity_id = 'bd-2500')")
    age(sql, 29.9, "entity_id = 'bd-2501'")
    age(sql, 40, "entity_id = 'bd-2502'")  # behind one that is kept
    keeper.clean()
    kept = list(follow(client, limit=1000))
    assert kept == [dict(e, timestamp=kept[i]["timestamp"]) for i, e in enumerate(everything[2501:])]
    assert ids(kept[:2]) == ["bd-2501", "bd-2502"]
    for old in everything[:2500]:
        if old["id"] % 500 == 0 or old is everything[2499]:
            assert_problem(client.get(f"{FEED}?after={old['id']}"), 410, "cursor-expired")
    assert ids(read(client, everything[2500]["id"])[0])[0] == "bd-2501", "who has missed nothing goes on"
    assert sql("SELECT events_forgotten FROM cluster") == [(everything[2500]["id"],)]
    assert sql("SELECT count(*) FROM event_numbers") == sql("SELECT count(*) FROM events")


def test_when_everything_has_gone_ids_go_on(client: AppClient, sql: Sql, keeper: Upkeep) -> None:
    sql(BEADS, 1, 5)
    seen = list(follow(client))
    age(sql, 31, "true")
    keeper.clean()
    assert sql("SELECT count(*) FROM events") == [(0,)]
    end = seen[-1]["id"]
    assert read(client, end) == ([], end)
    assert_problem(client.get(f"{FEED}?after={end - 1}"), 410, "cursor-expired")
    assert read(client, 0) == ([], 0)
    sql(BEADS, 6, 6)
    (event,), _ = read(client, end)
    assert event["id"] == end + 1


@pytest.mark.parametrize("how", ["DELETE FROM events", "TRUNCATE events", "TRUNCATE events RESTART IDENTITY"])
def test_what_is_removed_by_hand_is_no_reason_to_see_anything_twice(client: AppClient, sql: Sql, how: str) -> None:
    sql(BEADS, 1, 5)
    end = list(follow(client))[-1]["id"]
    sql(BEADS, 6, 6)  # and one that nobody has numbered yet
    sql(how)
    sql(BEADS, 7, 8)
    found = list(follow(client, end))
    assert ids(found) == ["bd-7", "bd-8"]
    assert [e["id"] for e in found] == [end + 1, end + 2]
    assert ids(list(follow(client, 0))) == ["bd-7", "bd-8"]


def test_one_event_removed_by_hand_leaves_the_readers_before_it_alone(client: AppClient, cursor: int, sql: Sql) -> None:
    sql(BEADS, 1, 5)
    found = list(follow(client, cursor))
    sql("DELETE FROM events WHERE entity_id = 'bd-3'")
    assert ids(list(follow(client, cursor, limit=1))) == ["bd-1", "bd-2", "bd-4", "bd-5"]
    assert ids(list(follow(client, found[1]["id"]))) == ["bd-4", "bd-5"]


def test_a_database_that_was_set_back_gives_no_id_again(client: AppClient, cursor: int, sql: Sql) -> None:
    """A reader that had read further would otherwise skip what has come since."""
    sql(BEADS, 1, 5)
    end = list(follow(client, cursor))[-1]["id"]
    sql("DELETE FROM event_numbers WHERE id > %s", end - 3)  # as a restore has it
    sql("DELETE FROM events WHERE place NOT IN (SELECT place FROM event_numbers)")
    sql("UPDATE cluster SET fencing_identity = 'another server, another timeline'")
    sql(BEADS, 6, 6)
    (event,), _ = read(client, end)
    assert (event["entity_id"], event["id"] > end) == ("bd-6", True)
    assert event["id"] < 2**53


def test_at_the_end_and_beyond_it_nothing_follows(client: AppClient, sql: Sql) -> None:
    """In a database whose ids begin at 1; a restored one is behind its readers until its next event."""
    sql("UPDATE cluster SET fencing_base = 0, fencing_identity = fencing_identity_now()")
    sql(BEADS, 1, 3)
    assert [event["id"] for event in read(client, 0)[0]] == [1, 2, 3, 4]
    for after in (4, 5, 99, 2**53 - 1):
        assert read(client, after) == read(client, after, entity_id="bd-1") == ([], after)
    assert len(list(follow(client, limit=1))) == 4


def test_rows_restored_without_their_gaps_are_not_numbered_twice(client: AppClient, cursor: int, sql: Sql) -> None:
    sql(BEADS, 1, 5)
    before = list(follow(client, cursor))
    sql("TRUNCATE event_gaps")
    sql("INSERT INTO event_gaps SELECT 1, 9223372036854775807 FROM generate_series(1, 2)")
    sql(BEADS, 6, 6)
    read(client)
    assert list(follow(client, cursor))[:5] == before
    assert ids(list(follow(client, cursor))[5:]) == ["bd-6"]


def test_an_entitys_history(database: db.Database, sql: Sql) -> None:
    sql(BEADS, 1, 2)
    for priority in (0, 1, 3):
        sql("UPDATE beads SET priority = %s WHERE id = 'bd-1'", priority)
    sql("DELETE FROM beads WHERE id = 'bd-1'")

    def page(before: int | None = None, limit: int = 10) -> list[events.Entry]:
        with database.connection() as conn:
            return list(events.history(conn, "bead", "bd-1", before=before, limit=limit))

    assert [(e.event.type, e.event.version) for e in page()] == [
        ("bead.deleted", 5), ("bead.updated", 4), ("bead.updated", 3), ("bead.updated", 2), ("bead.created", 1),
    ]  # fmt: skip
    assert [e.event.version for e in page(page(limit=2)[-1].place, 2)] == [3, 2]
    sql(BEADS, 1, 1)
    assert (page()[0].event.type, page()[0].event.id) == ("bead.created", None), "told before it is numbered"


def test_a_page_costs_the_same_wherever_it_is(client: AppClient, cursor: int, sql: Sql) -> None:
    """By rows and pages that the server touches, not by a clock."""
    sql(BEADS, 1, 20_000)
    while sql("SELECT number_events()") != [(0,)]:
        pass
    sql("ANALYZE events, event_numbers")

    def touched(after: int) -> int:
        plan: Any = sql(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)"
            " SELECT * FROM feed WHERE id BETWEEN %s AND %s ORDER BY id LIMIT 100",
            after + 1,
            after + events.SCAN,
        )
        plan = plan[0][0][0]["Plan"]
        return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]

    costs = [touched(cursor + behind) for behind in (0, 5000, 10_000, 19_900)]
    assert max(costs) < 2 * min(costs) < 2000, costs
