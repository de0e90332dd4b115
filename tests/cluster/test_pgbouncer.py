"""Through pgBouncer in transaction mode everything works as without it, and no setting stays on its sessions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import Cluster, PgBouncer, Postgres, documents, wait_until
from harness.cluster import ROOT
from harness.locks import BUILD, LOCKS, Sql, acquire, assert_lost, assert_problem, force, release, wait_expired
from harness.metrics import value
from harness.postgres import query

from loom import db, errors, locks

SETTINGS = """
    SELECT name, setting FROM pg_settings, (SELECT pg_sleep(0.2)) AS meanwhile
     WHERE source = 'session' AND name NOT IN ('application_name', 'TimeZone') -- which pgBouncer keeps for each client
"""


@pytest.fixture
def bouncer_dsn(pgbouncer: PgBouncer, database_name: str) -> str:
    return pgbouncer.dsn(database_name)


@pytest.fixture
def cluster(start_cluster: Callable[..., Cluster], bouncer_dsn: str) -> Cluster:
    """Two instances that reach the database only through pgBouncer."""
    cluster = start_cluster(2, dsn=bouncer_dsn)
    cluster.wait_healthy()
    return cluster


def test_a_lock_is_acquired_renewed_waited_for_released_and_forced(cluster: Cluster, sql: Sql) -> None:
    one, two = cluster.client(0), cluster.client(1)
    held = acquire(one, owner="a", metadata={"why": "pooled"})
    assert_problem(two.post(BUILD, {"owner": "b"}), 409, "lock-held")
    assert two.put(BUILD, {"fencing_token": held["fencing_token"], "ttl_seconds": 60}).status == 200
    assert two.get(BUILD).json["metadata"] == {"why": "pooled"}
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(two.post, BUILD, {"owner": "b", "wait_seconds": 20})
        wait_until(lambda: sql("SELECT 1 FROM lock_waiters"))
        assert release(one, held["fencing_token"]).status == 204
        granted = waiting.result(10)
    assert granted.status == 201
    assert granted.json["fencing_token"] > held["fencing_token"]
    assert force(one, granted.json["fencing_token"]).status == 204
    assert_lost(two.put(BUILD, {"fencing_token": granted.json["fencing_token"]}), "forced")
    assert [row["ended_how"] for row in one.get("/api/v1/grants?lock_name=build").json] == ["forced", "released"]
    assert len(one.get("/api/v1/instances").json) == 2


def test_no_setting_or_lock_stays_on_a_session_for_its_next_client(
    bouncer_dsn: str, sql: Sql, start_cluster: Callable[..., Cluster]
) -> None:
    sql(f"ALTER DATABASE {sql('SELECT current_database()')[0][0]} SET timezone = 'Asia/Kolkata'")
    cluster = start_cluster(2, dsn=bouncer_dsn)

    def work(number: int) -> None:
        client = cluster.client(number % 2)
        for i in range(20):
            name = f"lock {number} {i}"
            release(client, acquire(client, name)["fencing_token"], name)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
        sessions = list(threads.map(lambda _: query(bouncer_dsn, SETTINGS), range(4)))
    assert sessions == [[]] * 4
    assert query(bouncer_dsn, "SHOW statement_timeout") == [("0",)]
    assert query(bouncer_dsn, "SHOW timezone") == [("Asia/Kolkata",)]
    assert sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]


def test_a_killed_instance_is_marked_dead_by_its_master_and_replaced(cluster: Cluster, sql: Sql) -> None:
    former = cluster.client(0).get("/health").json["instance_id"]
    cluster.kill(0)
    wait_until(lambda: sql("SELECT status FROM instances WHERE instance_id = %s", former) == [("dead",)])
    cluster.wait_healthy()
    assert acquire(cluster.client(0))["instance_id"] != former


def test_what_the_database_reports_is_counted(cluster: Cluster, sql: Sql) -> None:
    """The notices of its functions reach the instance that called them."""
    client = cluster.client()
    acquire(client, owner="a", ttl_seconds=1)
    wait_expired(sql)
    acquire(client, owner="b")
    assert value(client, "loom_failover_events_total", event="lock_taken_over") == 1


def test_holding_and_fencing_in_python(bouncer_dsn: str, sql: Sql) -> None:
    sql("CREATE TABLE work (token bigint)")
    database = db.Database(bouncer_dsn)
    database.open()

    def write(token: int) -> None:
        with database.transaction() as conn:
            locks.check(conn, "build", token)
            db.run(conn, "INSERT INTO work VALUES (%(token)s)", token=token)

    try:
        with locks.hold("build", ttl=1, database=database) as lock:
            write(lock.fencing_token)
            sql("SELECT pg_sleep(1.5)")
            lock.ensure()
            write(lock.fencing_token)
        with pytest.raises(errors.LockLost):
            write(lock.fencing_token)
    finally:
        database.close()
    assert sql("SELECT token FROM work") == [(lock.fencing_token,)] * 2


def test_several_instances_can_apply_the_schema_through_it_at_once(pgbouncer: PgBouncer, postgres: Postgres) -> None:
    name = postgres.empty_database()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: db.migrate(pgbouncer.dsn(name)), range(4)))
    assert query(postgres.dsn(name), "SELECT count(*) FROM distributed_locks") == [(0,)]
    postgres.drop(name)


def test_the_configuration_that_the_documents_show_serves_loom(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster]
) -> None:
    """As it is written, but for the addresses."""
    own_postgres.query("CREATE ROLE loom_user LOGIN PASSWORD 'your_secure_password'")
    own_postgres.query("CREATE DATABASE loom OWNER loom_user")
    rules = own_postgres.data / "pg_hba.conf"
    rules.write_text(f"host all loom_user all scram-sha-256\n{rules.read_text()}")
    own_postgres.query("SELECT pg_reload_conf()")
    found = documents.blocks((ROOT / "docs/deployment.md").read_text())
    config = (ROOT / "deploy/pgbouncer/pgbouncer.ini").read_text()
    (users,) = [block.text for block in found if block.text.startswith('"loom_user"')]
    (own_postgres.folder / "userlist.txt").write_text(users)
    (own_postgres.folder / "userlist.txt").chmod(0o644)
    config = config.replace("host=postgres-host port=5432", f"host=127.0.0.1 port={own_postgres.port}")
    bouncer = PgBouncer(own_postgres, text=config.replace("/etc/pgbouncer", str(own_postgres.folder)))
    try:
        dsn = f"postgresql://loom_user:your_secure_password@127.0.0.1:{bouncer.port}/loom"
        cluster = start_cluster(1, dsn=dsn)
        assert acquire(cluster.client(0))["owner"]
        assert not [line for line in bouncer.process.last_lines().splitlines() if "WARNING" in line or "ERROR" in line]
    finally:
        bouncer.close()


def test_a_comment_behind_a_value_is_refused(own_postgres: Postgres) -> None:
    config = (ROOT / "deploy/pgbouncer/pgbouncer.ini").read_text()
    with pytest.raises(AssertionError, match="pool_mode"):
        PgBouncer(own_postgres, text=config.replace("= transaction", "= transaction ; for Loom"))


def test_a_percent_encoded_name_reaches_its_lock(cluster: Cluster) -> None:
    assert cluster.client(0).post(LOCKS + "a%2F%C3%BC%20(1)%25").json["lock_name"] == "a/ü (1)%"


def test_tokens_grow_after_a_failover_of_the_server_behind_it(
    start_postgres: Callable[..., Postgres],
) -> None:
    """A pooler hides that its server changed: only the granting function itself can notice."""
    primary = start_postgres()
    name = primary.database()
    backup = primary.folder / "backup"
    primary.run("pg_basebackup", "--pgdata", str(backup), "--checkpoint=fast", "--dbname", primary.dsn())
    (backup / "standby.signal").touch()
    bouncer = PgBouncer(primary)
    database = db.Database(bouncer.dsn(name))
    database.open()

    def token() -> int:
        with database.connection() as conn:
            row = db.one(conn, "SELECT next_fencing_token() AS token")
        assert row is not None
        return row["token"]

    try:
        last = max(token() for _ in range(50))
        primary.stop()
        port = primary.port
        standby = start_postgres(copy_of=backup, port=port)
        standby.query("SELECT pg_promote()")
        wait_until(lambda: database.away is None and query(bouncer.dsn(name), "SELECT 1"))
        new = wait_until(lambda: answered(token))
        assert new > last
    finally:
        database.close()
        bouncer.close()


def answered(token: Callable[[], int]) -> int:
    try:
        return token()
    except errors.Unavailable:
        return 0
