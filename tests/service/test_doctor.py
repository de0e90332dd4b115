"""`loom doctor` names each thing that is wrong, says what mends it, and finds no fault where there is none."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2.extensions
import pytest
from click.testing import CliRunner
from harness import AppClient, PgBouncer, Postgres, free_port, program, wait_until
from harness.locks import Sql, acquire
from harness.postgres import binaries, query
from harness.work import bead, claim, team

from loom import doctor
from loom.cli import main
from loom.config import load, resource
from loom.doctor import Finding, Limits

Session = Callable[[], psycopg2.extensions.connection]
pytestmark = pytest.mark.usefixtures("instance")  # so that only the fault of the test is named


def examine(dsn: str, settings: str = "", url: str | None = None, **limits: Any) -> dict[str, Finding]:
    """What each check finds. `settings`: the text of config.yaml; `limits`: other ones than usual."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(settings)
        file.flush()
        config = load(file.name, {"DATABASE_DSN": dsn})
    return {finding.check: finding for finding in doctor.examine(config, url, Limits(**limits))}


def faults(*args: Any, **more: Any) -> dict[str, Finding]:
    return {name: finding for name, finding in examine(*args, **more).items() if finding.state == "wrong"}


def fault(name: str, *args: Any, **more: Any) -> Finding:
    """The finding of this check, which alone has found a fault."""
    found = faults(*args, **more)
    assert found.keys() == {name}, found
    assert found[name].remedy
    return found[name]


def mend(finding: Finding, dsn: str) -> None:
    """Runs the SQL of the remedy, as an operator would paste it."""
    for statement in re.findall(r'-c "([^"]*)"', finding.remedy)[0].split("; "):
        query(dsn, statement)


def test_no_fault_is_found_where_there_is_none(dsn: str) -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"], env={"DATABASE_DSN": dsn, "LOOM_CONFIG": os.devnull})
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["healthy"]) == (0, True), answer
    assert [check["check"] for check in answer["checks"]] == [check.name for check in doctor.CHECKS]
    assert {check["check"] for check in answer["checks"] if check["state"] == "unchecked"} == {"nginx", "syslog"}


def test_a_pooler_is_no_fault(pgbouncer: PgBouncer, database_name: str) -> None:
    found = examine(pgbouncer.dsn(database_name))
    assert [name for name, finding in found.items() if finding.state == "wrong"] == []
    assert "a pooler stands between" in found["connections"].text


def test_faults_are_told_to_scripts_and_to_people(tmp_path: Path) -> None:
    env = {"DATABASE_DSN": "postgresql://u:hunter22@127.0.0.1:9/db", "LOOM_CONFIG": os.devnull}
    result = CliRunner().invoke(main, ["doctor"], env=env)
    assert result.exit_code == 1
    assert "wrong     network        no server listens on 127.0.0.1:9\n" in result.stdout
    assert "nc -zv 127.0.0.1 9" in result.stdout
    assert "hunter22" not in result.output
    (tmp_path / "config.yaml").write_text("serverr: {}")
    result = CliRunner().invoke(main, ["doctor", "--json"], env={"LOOM_CONFIG": str(tmp_path / "config.yaml")})
    assert result.exit_code == 1
    assert "unknown key" in json.loads(result.stdout)["checks"][0]["text"]


def test_nothing_is_written(dsn: str, sql: Sql, client: AppClient) -> None:
    acquire(client, "build")
    client.post("/api/v1/locks/build", {"owner": "other", "wait_seconds": 1})
    sql("""CREATE OR REPLACE FUNCTION keeps_place(asked_at timestamptz, t timestamptz) RETURNS boolean
           LANGUAGE sql AS 'DELETE FROM distributed_locks RETURNING true'""")
    assert "read-only transaction" in fault("locks", dsn).text
    assert sql("SELECT lock_name FROM distributed_locks") == [("build",)]


# Which of name, network, login and database it is


def test_a_name_that_does_not_resolve() -> None:
    found = fault("host name", "postgresql://u:hunter22@no-such-host.invalid/db")
    assert "no-such-host.invalid does not resolve" in found.text


def test_a_closed_port_and_a_missing_socket(tmp_path: Path) -> None:
    assert "no server listens on localhost:9" in fault("network", "host=localhost port=9 dbname=db").text
    assert f"no server listens on {tmp_path}" in fault("network", f"host={tmp_path} dbname=db").text


def test_a_host_that_drops_packets() -> None:
    """A listener whose queue is full answers no further SYN."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        queued = [socket.socket() for _ in range(4)]
        for other in queued:
            other.setblocking(False)
            other.connect_ex(address)
        found = fault("network", f"host=127.0.0.1 port={address[1]} dbname=db", "database: {timeout: 1}")
        assert "does not answer within 1.0 s" in found.text
        for other in queued:
            other.close()


def test_one_of_two_servers_that_is_away(postgres: Postgres, database_name: str) -> None:
    closed = free_port()
    dsn = postgres.dsn(database_name, tcp=True, host="127.0.0.1,localhost", port=f"{postgres.port},{closed}")
    assert fault("network", dsn).text == f"no server listens on localhost:{closed}"


def test_a_database_that_is_not_there(postgres: Postgres) -> None:
    found = fault("database", postgres.dsn("no_such"))
    assert 'database "no_such" does not exist' in found.text
    assert examine(postgres.dsn("no_such"))["login"].state == "ok"
    try:
        mend(found, postgres.dsn())
        assert fault("schema", postgres.dsn("no_such")).remedy == "loom migrate"
    finally:
        postgres.drop("no_such")


@pytest.fixture
def weak(postgres: Postgres, database_name: str, dsn: str) -> Iterator[str]:
    """A DSN of a role that has no rights."""
    role = f"weak_{database_name}"
    postgres.query(f"CREATE ROLE {role} LOGIN")
    yield postgres.dsn(database_name, user=role)
    query(dsn, f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_role_that_may_not_open_the_database(weak: str, dsn: str, database_name: str) -> None:
    query(dsn, f"REVOKE CONNECT ON DATABASE {database_name} FROM PUBLIC")
    found = fault("database", weak)
    assert "permission denied for database" in found.text
    mend(found, dsn)
    assert faults(weak).keys() == {"rights"}


def test_a_server_that_is_read_only(sql: Sql, dsn: str, database_name: str) -> None:
    sql(f"ALTER DATABASE {database_name} SET default_transaction_read_only = on")
    assert "target_session_attrs" in fault("primary", dsn).remedy
    assert examine(dsn)["database"].state == "ok"


def test_a_wrong_password_an_unknown_role_and_a_closed_pg_hba(own_postgres: Postgres) -> None:
    own_postgres.query("CREATE ROLE secretive LOGIN PASSWORD 'right'")
    own_postgres.query("CREATE ROLE banned LOGIN")
    hba = own_postgres.data / "pg_hba.conf"
    hba.write_text("host all secretive all scram-sha-256\nhost all banned all reject\n" + hba.read_text())
    own_postgres.query("SELECT pg_reload_conf()")
    name = own_postgres.database()

    def login(user: str, **more: str) -> str:
        found = faults(own_postgres.dsn(name, tcp=True, user=user, **more))
        assert found.keys() == {"login"}, found
        return found["login"].text

    banned = own_postgres.dsn(name, tcp=True, user="banned")
    wait_until(lambda: "login" in faults(banned))  # it has read the file
    assert "password authentication failed" in login("secretive", password="wrong")
    assert "no password supplied" in login("secretive")
    assert "pg_hba.conf rejects" in login("banned")
    assert "does not exist" in login("nobody")
    found = faults(own_postgres.dsn(name, tcp=True, sslmode="require"))
    assert found.keys() == {"TLS"}, found
    assert "login" not in faults(own_postgres.dsn(name, tcp=True, user="secretive", password="right"))


# The server


def test_an_encoding_that_is_not_utf8(postgres: Postgres) -> None:
    postgres.query("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    try:
        assert "LATIN1" in faults(postgres.dsn("latin"))["database"].text
    finally:
        postgres.drop("latin")


def test_a_server_of_an_unknown_version(dsn: str) -> None:
    assert "Loom runs on 12 to 9" in fault("server version", dsn, newest_server=9).text


def test_a_connection_without_tls_to_another_host(start_postgres: Callable[..., Postgres]) -> None:
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    if not addresses:
        pytest.skip("this host has no address but the loopback's")
    server = start_postgres(settings={"listen_addresses": "*", "max_prepared_transactions": "2"})
    dsn = server.dsn(server.database(), host=addresses[0])
    found = faults(dsn)
    assert found.keys() == {"TLS", "instances"}, found
    assert "sslmode=require" in found["TLS"].remedy

    with closing(psycopg2.connect(dsn)) as conn:
        conn.tpc_begin("forgotten")
        conn.cursor().execute("SELECT txid_current()")
        conn.tpc_prepare()
    found = faults(dsn, transaction_seconds=0)
    assert "prepared transaction" in found["snapshots"].text
    mend(found["snapshots"], dsn)
    assert "snapshots" not in faults(dsn, transaction_seconds=0.5)

    server.query("SELECT pg_create_physical_replication_slot('old', true)")
    found = faults(dsn)
    assert "slot old is not used" in found["replication"].text
    server.query("SELECT pg_drop_replication_slot('old')")
    server.query("ALTER SYSTEM SET synchronous_standby_names = 'other'")
    server.query("SELECT pg_reload_conf()")
    wait_until(lambda: "every commit waits" in faults(dsn).get("replication", Finding("ok", "")).text)


def test_a_server_without_room(start_postgres: Callable[..., Postgres]) -> None:
    """Too small for the pools, though nobody is refused yet; then full."""
    server = start_postgres(settings={"max_connections": "13"})
    dsn = server.dsn(server.database())
    found = faults(dsn)
    assert found.keys() == {"connections", "instances"}
    assert "may open 14 connections; max_connections leaves room for 13" in found["connections"].text
    sessions = [psycopg2.connect(dsn) for _ in range(13)]
    try:
        assert "too many clients" in fault("connections", dsn).text
    finally:
        for conn in sessions:
            conn.close()


@pytest.mark.parametrize("whose", ["ROLE {role}", "DATABASE {database}"])
def test_a_limit_of_connections_that_is_too_low(weak: str, dsn: str, database_name: str, whose: str) -> None:
    role = f"weak_{database_name}"
    query(
        dsn,
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
    )
    query(dsn, f"ALTER {whose.format(role=role, database=database_name)} CONNECTION LIMIT 5")
    assert "leaves room for 5" in fault("connections", weak).text


def test_a_setting_with_which_writes_may_be_lost(dsn: str, sql: Sql, database_name: str) -> None:
    sql(f"ALTER DATABASE {database_name} SET synchronous_commit = off")
    found = fault("durability", dsn)
    assert "synchronous_commit off" in found.text
    sql(found.remedy)
    assert not faults(dsn)


def test_a_snapshot_that_is_held(dsn: str, session: Session) -> None:
    conn = session()
    conn.cursor().execute("SELECT 1")
    found = wait_until(lambda: faults(dsn, transaction_seconds=0.1))
    assert found.keys() == {"snapshots"}
    mend(found["snapshots"], dsn)
    assert not faults(dsn, transaction_seconds=0.1)


def test_a_session_that_keeps_others_waiting(dsn: str, sql: Sql, session: Session) -> None:
    session().cursor().execute("LOCK TABLE agents")
    waiter = threading.Thread(target=lambda: sql("UPDATE agents SET name = 'x'"))
    waiter.start()
    found = wait_until(lambda: faults(dsn, row_lock_seconds=0.1))
    assert found.keys() == {"row locks"}
    mend(found["row locks"], dsn)
    waiter.join()
    assert not faults(dsn, row_lock_seconds=0.1)


# Loom's state


def test_a_role_without_rights(weak: str, dsn: str) -> None:
    found = fault("rights", weak)
    assert examine(weak)["instances"].state == "unchecked"
    assert "permission denied" in examine(weak)["instances"].text
    mend(found, dsn)
    assert not faults(weak)


def test_a_schema_of_another_version(dsn: str, sql: Sql) -> None:
    sql("UPDATE schema_version SET version = version + 1")
    assert fault("schema", dsn).remedy == "upgrade this Loom"
    for change in ("version = version - 2", "version = version + 1, checksum = 'other'"):
        sql(f"UPDATE schema_version SET {change}")
        assert fault("schema", dsn).remedy == "loom migrate"
    subprocess.run(
        [sys.executable, "-m", "loom", "migrate"],
        env={**os.environ, "DATABASE_DSN": dsn, "LOOM_CONFIG": os.devnull},
        check=True,
    )
    assert not faults(dsn)


def test_a_table_that_no_vacuum_cleans(dsn: str, sql: Sql) -> None:
    sql("ALTER TABLE lock_waiters SET (autovacuum_enabled = false)")
    sql("INSERT INTO lock_waiters (lock_name, owner) SELECT 'a', n::text FROM generate_series(1, 5000) AS n")
    sql("DELETE FROM lock_waiters")
    assert "autovacuum is switched off for lock_waiters" in fault("vacuum", dsn).text
    sql("ALTER TABLE lock_waiters RESET (autovacuum_enabled)")
    found = wait_until(lambda: faults(dsn, dead_rows=4000))
    assert found.keys() == {"vacuum"}
    assert "lock_waiters has 5,000 dead rows" in found["vacuum"].text
    mend(found["vacuum"], dsn)


def test_a_table_that_is_mostly_empty(dsn: str, sql: Sql) -> None:
    sql("INSERT INTO lock_waiters (lock_name, owner) SELECT 'a', n::text FROM generate_series(1, 5000) AS n")
    sql("DELETE FROM lock_waiters WHERE owner <> '5000'")
    sql("VACUUM lock_waiters")
    found = wait_until(lambda: faults(dsn, empty_bytes=100_000))
    assert "lock_waiters takes" in found["vacuum"].text
    mend(found["vacuum"], dsn)
    assert not faults(dsn, empty_bytes=100_000)


@pytest.mark.usefixtures("server_age")
def test_a_stale_instance(dsn: str, sql: Sql) -> None:
    sql("""INSERT INTO instances (instance_id, hostname, last_heartbeat, metadata)
           VALUES (gen_random_uuid(), 'far', clock_timestamp() - interval '3 min', '{"port": 8081}')""")
    found = fault("instances", dsn)
    assert found.text == "far:8081 has been silent for 3 min"
    assert "on far: systemctl status loom@8081" in found.remedy


def test_that_no_instance_is_active(dsn: str, sql: Sql) -> None:
    sql("UPDATE instances SET status = 'draining'")
    assert fault("instances", dsn).text == "no instance is active"


def test_what_is_not_cleaned_up(dsn: str, sql: Sql, client: AppClient) -> None:
    team(client, "a")
    bead(client, "x")
    claim(client, "x")
    acquire(client, "build")
    sql("UPDATE distributed_locks SET expires_at = clock_timestamp() - interval '2 min'")
    sql("UPDATE beads SET lease_expires_at = clock_timestamp() - interval '2 min'")
    sql("UPDATE events SET timestamp = clock_timestamp() - interval '2 min'")
    found = fault("clean-up", dsn)
    assert "1 expired locks, 1 lapsed claims, " in found.text
    assert "events without a place" in found.text


def test_a_lock_that_others_wait_for_too_long(dsn: str, sql: Sql, client: AppClient) -> None:
    acquire(client, "build")
    sql("UPDATE distributed_locks SET acquired_at = clock_timestamp() - interval '5 min'")
    assert not faults(dsn)
    client.post("/api/v1/locks/build", {"owner": "other", "wait_seconds": 1})
    found = fault("locks", dsn)
    assert "has held build for 5 min, and 1 wait for it" in found.text
    mend(found, dsn)
    assert not faults(dsn)


def test_a_lock_with_two_holders(dsn: str, sql: Sql, client: AppClient) -> None:
    acquire(client, "build")
    sql("ALTER TABLE distributed_locks DROP CONSTRAINT distributed_locks_pkey")
    sql("INSERT INTO distributed_locks SELECT * FROM distributed_locks")
    assert fault("split brain", dsn).text.startswith("build: two rows")


# Around


def test_a_pool_that_is_larger_than_the_threads(dsn: str) -> None:
    found = fault("pool", f"{dsn} pool_max_conns=25")
    assert "25, but only 8 threads" in found.text
    assert not faults(f"{dsn} pool_max_conns=25", "server: {threads: 25}")


def test_a_syslog_server_that_is_not_there(dsn: str) -> None:
    def syslog(address: str) -> str:
        return f"logging: {{syslog: {{enabled: true, address: '{address}'}}}}"

    assert "does not resolve" in fault("syslog", dsn, syslog("no-such-host.invalid:514")).text
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert examine(dsn, syslog(address))["syslog"].state == "ok"
    assert "takes no lines: Connection refused" in fault("syslog", dsn, syslog(address)).text


def test_an_nginx_that_does_not_answer_or_reaches_no_instance(dsn: str, start_cluster: Callable[..., Any]) -> None:
    assert "Connection refused" in fault("nginx", dsn, url=f"http://127.0.0.1:{free_port()}").text
    cluster = start_cluster(1, nginx=True)
    cluster.wait_healthy(2)
    assert examine(dsn, url=cluster.nginx_url)["nginx"].state == "ok"
    other = f"http://127.0.0.1:{cluster.ports[0]}/api"
    assert "not as Loom" in fault("nginx", dsn, url=other).text
    cluster.masters[0].stop()
    wait_until(lambda: "nginx reaches no instance" in faults(dsn, url=cluster.nginx_url)["nginx"].text)


@pytest.mark.all
def test_a_clock_that_is_wrong(start_postgres: Callable[..., Postgres]) -> None:
    """A PostgreSQL whose clock is five minutes ahead."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None) or program("faketime", "faketime")
    fake = f"LD_PRELOAD={library} FAKETIME=+300s FAKETIME_DONT_FAKE_MONOTONIC=1"
    with tempfile.TemporaryDirectory() as name:
        programs = Path(name)
        programs.chmod(0o755)
        (programs / "initdb").symlink_to(binaries() / "initdb")
        (programs / "postgres").write_text(f'#!/bin/sh\nexec env {fake} {binaries()}/postgres "$@"\n')
        (programs / "postgres").chmod(0o755)
        server = start_postgres(programs=programs)
        found = faults(server.dsn(server.database()))
    assert "the clock of the database is 5 min ahead of" in found["clock"].text


@pytest.mark.all
def test_a_standby_that_is_behind(own_postgres: Postgres, start_postgres: Callable[..., Postgres]) -> None:
    copy = own_postgres.folder / "copy"
    dsn = own_postgres.dsn(own_postgres.database())
    own_postgres.run("pg_basebackup", "-D", str(copy), "-R", "-d", own_postgres.dsn())
    standby = start_postgres(copy_of=copy)
    assert "replication" not in faults(dsn)
    standby.query("SELECT pg_wal_replay_pause()")
    own_postgres.query("SELECT pg_logical_emit_message(true, 'x', repeat('x', 3 * 1048576))")
    found = wait_until(lambda: faults(dsn, replica_bytes=2**20).get("replication"))
    assert "3 MB behind" in found.text
    assert fault("primary", standby.dsn(query(dsn, "SELECT current_database()")[0][0])).remedy


def test_each_check_has_a_test_that_sees_it_fail_and_is_explained() -> None:
    source, documented = Path(__file__).read_text(), resource("docs/troubleshooting.md").read_text()
    names = [check.name for check in doctor.CHECKS]
    assert [name for name in names if f'"{name}"' not in source] == []
    assert [name for name in names if f"| {name} |" not in documented] == []
