"""The registry shows which instances live: no dead one revives, and an outage of the database kills none."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from harness import AppClient, wait_until
from harness.locks import BUILD, LOCKS, Sql, acquire, assert_problem, instant

from loom import db, instances, locks
from loom.instances import Instance

KEYS = ["instance_id", "hostname", "started_at", "last_heartbeat", "status", "metadata", "heartbeat_age_seconds"]
INSTANCES = "/api/v1/instances"


@pytest.fixture
def another(database: db.Database, sql: Sql) -> Callable[..., str]:
    """Registers another instance, whose last heartbeat is `silent` seconds old, and returns its id."""

    def register(silent: float = 0, status: str = "active") -> str:
        number = str(uuid.uuid4())
        sql("SELECT register_instance(%s, 'elsewhere', '{}')", number)
        sql(
            "UPDATE instances SET last_heartbeat = clock_timestamp() - %s, status = %s WHERE instance_id = %s",
            timedelta(seconds=silent),
            status,
            number,
        )
        return number

    return register


def row(sql: Sql, instance_id: str) -> tuple[Any, ...] | None:
    found = sql("SELECT status, last_heartbeat, metadata FROM instances WHERE instance_id = %s", instance_id)
    return found[0] if found else None


def test_an_instance_is_listed_with_its_host_and_metadata(client: AppClient, instance: Instance) -> None:
    (listed,) = client.get(INSTANCES).json
    assert list(listed) == KEYS
    assert listed["instance_id"] == instance.instance_id
    assert (listed["hostname"], listed["status"]) == (instance.hostname, "active")
    assert listed["metadata"] == {"pid": 1, "port": 8080, "version": "test"}
    assert instant(listed["started_at"]) <= instant(listed["last_heartbeat"])
    assert 0 <= listed["heartbeat_age_seconds"] < 60
    one = client.get(f"{INSTANCES}/{instance.instance_id}")
    assert one.status == 200
    assert {**one.json, "heartbeat_age_seconds": 0} == {**listed, "heartbeat_age_seconds": 0}


def test_the_registry_is_read_page_by_page(client: AppClient, another: Callable[..., str], instance: Instance) -> None:
    there = [instance.instance_id, *(another() for _ in range(4))]
    found: list[str] = []
    page: str | None = f"{INSTANCES}?limit=2"
    while page:
        answer = client.get(page)
        found += [row["instance_id"] for row in answer.json]
        page = answer.headers["Link"].partition(">")[0][1:] if "Link" in answer.headers else None
    assert found == there
    assert_problem(client.get(f"{INSTANCES}?after=WzEsMl0"), 400, "invalid")


def test_a_request_of_an_instance_that_must_confirm_itself_has_one_bound(
    client: AppClient, instance: Instance, session: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one for the wait for another heartbeat, one for its own and one for the request."""
    with session() as conn, conn.cursor() as cursor:
        cursor.execute("SELECT FROM instances FOR UPDATE")
        monkeypatch.setattr(instances, "TRUST", -1.0)  # the last heartbeat counts as too old
        answers: list[tuple[int, float]] = []

        def ask() -> None:
            started = time.monotonic()
            answers.append((client.get(INSTANCES).status, time.monotonic() - started))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [status for status, _ in answers] == [503] * 3
    assert max(seconds for _, seconds in answers) < 5


@pytest.mark.parametrize("wrong", ["00000000-0000-0000-0000-000000000000", "not-a-uuid", "%FF", "a%20b"])
def test_an_unknown_instance_is_404(client: AppClient, wrong: str) -> None:
    assert_problem(client.get(f"{INSTANCES}/{wrong}"), 404, "not-found")


def test_a_heartbeat_updates_the_row(sql: Sql, instance: Instance) -> None:
    before = row(sql, instance.instance_id)
    instance.beat()
    after = row(sql, instance.instance_id)
    assert before is not None
    assert after is not None
    assert after[1] > before[1]


def test_the_list_begins_with_the_oldest(client: AppClient, instance: Instance, another: Callable[..., str]) -> None:
    second, third = another(), another()
    assert [one["instance_id"] for one in client.get(INSTANCES).json] == [instance.instance_id, second, third]


# A new id


def test_an_instance_removed_by_hand_comes_back_with_a_new_id(client: AppClient, sql: Sql, instance: Instance) -> None:
    former = instance.instance_id
    sql("DELETE FROM instances")
    instance.beat()
    assert instance.instance_id != former
    (listed,) = client.get(INSTANCES).json
    assert listed["instance_id"] == instance.instance_id
    assert listed["metadata"] == {"pid": 1, "port": 8080, "version": "test"}
    assert client.get("/health").json["instance_id"] == instance.instance_id


def test_no_heartbeat_revives_an_instance_that_was_declared_dead(sql: Sql, instance: Instance) -> None:
    former = instance.instance_id
    sql("UPDATE instances SET status = 'dead'")
    for status in ("active", "draining"):
        assert sql("SELECT heartbeat_instance(%s, %s)", former, status) == [(None,)]
    instance.beat()
    assert instance.instance_id != former
    assert (row(sql, former) or "")[0] == "dead"
    assert (row(sql, instance.instance_id) or "")[0] == "active"


def test_the_watcher_of_a_process_is_told_its_new_id_and_its_end(database: db.Database, sql: Sql) -> None:
    told: list[bytes] = []
    first = str(uuid.uuid4())
    me = Instance(database, {}, first, told.append)
    me.beat()
    assert told == []
    sql("DELETE FROM instances")
    me.beat()
    assert told == [uuid.UUID(me.instance_id).bytes]
    me.leave()
    assert told[1:] == [b""], "it has left in order"


def test_an_instance_that_was_paused_for_long_takes_a_new_id_before_it_serves(
    client: AppClient, sql: Sql, instance: Instance
) -> None:
    """As after SIGSTOP or on a frozen machine: others have declared it dead meanwhile."""
    former = instance.instance_id
    sql("DELETE FROM instances")
    assert acquire(client, "trusting", owner="a")["instance_id"] == former, "it trusts its id for 30 s"
    instance._last_good -= instances.TRUST
    assert acquire(client, owner="a")["instance_id"] == instance.instance_id != former
    assert row(sql, instance.instance_id) is not None


def test_many_requests_after_a_pause_register_the_instance_once(
    client: AppClient, sql: Sql, instance: Instance
) -> None:
    sql("DELETE FROM instances")
    instance._last_good -= instances.TRUST
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda i=i: answers.append(acquire(client, f"lock {i}")["instance_id"]))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {instance.instance_id}
    assert len(sql("SELECT 1 FROM instances")) == 1


# Draining and leaving


def test_an_operator_orders_an_instance_to_drain_and_to_be_active_again_in_psql(
    client: AppClient, sql: Sql, instance: Instance
) -> None:
    sql("UPDATE instances SET status = 'draining'")
    instance.beat()
    assert (row(sql, instance.instance_id) or "")[0] == "draining", "a heartbeat does not undo the order"
    assert (client.get("/health/ready").status, client.get("/health").json["active_instances"]) == (503, 0)
    assert acquire(client)["instance_id"] == instance.instance_id, "it serves what still arrives"
    sql("UPDATE instances SET status = 'active'")
    instance.beat()
    assert (client.get("/health/ready").status, client.get("/health").json["active_instances"]) == (200, 1)


def test_an_instance_with_a_new_id_has_no_order_to_drain(client: AppClient, sql: Sql, instance: Instance) -> None:
    sql("UPDATE instances SET status = 'draining'")
    instance.beat()
    sql("DELETE FROM instances")
    instance.beat()
    assert client.get("/health/ready").status == 200


def test_an_instance_that_leaves_drains_whatever_an_operator_writes(sql: Sql, instance: Instance) -> None:
    instance.status = "draining"
    sql("UPDATE instances SET status = 'active'")
    instance.beat()
    assert (row(sql, instance.instance_id) or "")[0] == "draining"
    assert instance.draining


def test_a_draining_instance_is_listed_as_draining_and_not_counted(
    client: AppClient, sql: Sql, instance: Instance
) -> None:
    instance.drain()
    wait_until(lambda: (row(sql, instance.instance_id) or "")[0] == "draining")
    assert client.get(INSTANCES).json[0]["status"] == "draining"
    health = client.get("/health")
    assert (health.status, health.json["active_instances"], health.json["draining"]) == (200, 0, True)
    assert client.get("/health/ready").status == 503
    assert acquire(client)["lock_name"] == "build", "requests that still arrive are served"


def test_an_instance_that_leaves_removes_its_row_and_its_own_locks(
    database: db.Database, sql: Sql, instance: Instance
) -> None:
    with database.connection() as conn:
        owner = f"instance:{instance.instance_id}"
        locks.acquire(conn, "own", owner, timedelta(minutes=1), instance_id=instance.instance_id)
    instance.leave()
    assert sql("SELECT 1 FROM instances UNION ALL SELECT 1 FROM distributed_locks") == []
    assert sql("SELECT ended_how FROM grants") == [("released",)]


def test_a_clients_lock_outlives_the_instance_that_granted_it(client: AppClient, sql: Sql, instance: Instance) -> None:
    token = acquire(client, owner="a")["fencing_token"]
    instance.leave()
    sql("UPDATE instances SET status = 'dead'")
    renewed = client.put(BUILD, {"fencing_token": token})
    assert renewed.status == 200


# Dead or not


@pytest.mark.usefixtures("server_age")
def test_an_instance_is_dead_after_a_minute_without_a_heartbeat(client: AppClient, another: Callable[..., str]) -> None:
    silent, slow = another(silent=61), another(silent=58)
    statuses = {one["instance_id"]: one["status"] for one in client.get(INSTANCES).json}
    assert statuses[silent] == "dead"
    assert statuses[slow] == "active"
    assert client.get(f"{INSTANCES}/{silent}").json["status"] == "dead"
    assert client.get("/health").json["active_instances"] == 2


@pytest.mark.usefixtures("server_age")
@pytest.mark.parametrize(("seconds", "status"), [(5, "active"), (58, "active"), (61, "dead")])
def test_no_instance_is_dead_in_the_first_minute_after_an_outage(
    client: AppClient, another: Callable[..., str], sql: Sql, seconds: int, status: str
) -> None:
    silent = another(silent=90)
    sql("UPDATE cluster SET outage_ended_at = clock_timestamp() - %s", timedelta(seconds=seconds))
    assert client.get(f"{INSTANCES}/{silent}").json["status"] == status


@pytest.mark.usefixtures("server_age")
@pytest.mark.parametrize(("server_age", "status"), [("50 s", "active"), ("70 s", "dead")], indirect=["server_age"])
def test_no_instance_is_dead_in_the_first_minute_after_a_start_of_the_server(
    client: AppClient, another: Callable[..., str], status: str
) -> None:
    assert client.get(f"{INSTANCES}/{another(silent=90)}").json["status"] == status


@pytest.mark.usefixtures("server_age")
def test_an_instance_marked_dead_by_its_master_is_dead_also_after_an_outage(
    client: AppClient, another: Callable[..., str], sql: Sql
) -> None:
    sql("UPDATE cluster SET outage_ended_at = clock_timestamp()")
    assert client.get(f"{INSTANCES}/{another(status='dead')}").json["status"] == "dead"


@pytest.mark.usefixtures("server_age")
def test_missing_heartbeats_of_all_instances_are_an_outage(
    client: AppClient, another: Callable[..., str], sql: Sql, instance: Instance
) -> None:
    other = another()
    sql("UPDATE instances SET last_heartbeat = clock_timestamp() - INTERVAL '90 seconds'")
    instance.beat()  # the first to come back
    (ended,) = sql("SELECT clock_timestamp() - outage_ended_at FROM cluster")[0]
    assert ended < timedelta(seconds=5)
    assert client.get(f"{INSTANCES}/{other}").json["status"] == "active"


@pytest.mark.usefixtures("server_age")
def test_missing_heartbeats_of_some_instances_are_no_outage(
    client: AppClient, another: Callable[..., str], sql: Sql, instance: Instance
) -> None:
    silent = another(silent=90)
    another()
    sql(
        "UPDATE instances SET last_heartbeat = clock_timestamp() - INTERVAL '20 seconds' WHERE instance_id = %s",
        instance.instance_id,
    )
    instance.beat()
    assert sql("SELECT outage_ended_at = '-infinity' FROM cluster") == [(True,)]
    assert client.get(f"{INSTANCES}/{silent}").json["status"] == "dead"


def test_active_instances_counts_active_ones_with_a_heartbeat_in_the_last_minute(
    client: AppClient, another: Callable[..., str]
) -> None:
    another()
    another(status="draining")
    another(status="dead")
    another(silent=61)
    assert client.get("/health").json["active_instances"] == 2


def test_metadata_is_returned_unchanged(database: db.Database, client: AppClient) -> None:
    about = {"zone": "ü", "nested": {"list": [1, None, True]}}
    other = Instance(database, about)
    other.beat()
    assert json.dumps(client.get(f"{INSTANCES}/{other.instance_id}").json["metadata"]) == json.dumps(about)
    other.leave()
    assert client.get(f"{INSTANCES}/{other.instance_id}").status == 404
    assert client.get(LOCKS + "x").status == 404
