"""A password of the database that is rotated while Loom runs needs no restart."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cluster, Postgres
from harness.processes import wait_until


@pytest.mark.parametrize("way", ["dsn_file", "password_command"])
def test_a_rotated_password_needs_no_restart(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster], tmp_path: Path, way: str
) -> None:
    server, secret = own_postgres, tmp_path / "secret"
    name = server.database()
    server.query("CREATE ROLE app LOGIN SUPERUSER PASSWORD 'first-pa55'")
    hba = server.data / "pg_hba.conf"
    hba.write_text("local all loom trust\nlocal all app scram-sha-256\nhost all loom all trust\n")
    server.query("SELECT pg_reload_conf()")
    dsn = server.dsn(name, user="app")

    def rotate(password: str) -> None:
        server.query(f"ALTER ROLE app PASSWORD '{password}'")
        secret.write_text(f"{dsn} password={password}\n" if way == "dsn_file" else f"{password}\n")

    rotate("first-pa55")
    if way == "dsn_file":
        cluster = start_cluster(1, dsn="", env={"DATABASE_DSN_FILE": str(secret)})
    else:
        command = f"{sys.executable} -c 'print(open(\"{secret}\").read())'"
        cluster = start_cluster(1, dsn=dsn, config=f"database: {{password_command: {json.dumps(command)}}}")
    cluster.wait_healthy()
    rotate("second-pa55")
    server.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
    client = cluster.client()
    wait_until(lambda: client.post("/api/v1/locks/build", {"owner": "a"}).status in (200, 201), 20)
    cluster.wait_healthy()
    secret.unlink()
    server.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
    wait_until(lambda: client.get("/api/v1/locks").status == 503, 20)
    text = client.get("/health").body.decode() + cluster.masters[0].log.read_text()
    assert f"database.{way}" in text
    for password in ("first-pa55", "second-pa55"):
        assert password not in text


def test_a_password_in_a_file_that_all_can_read_is_a_warning(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster]
) -> None:
    dsn = own_postgres.dsn(own_postgres.database(), password="s3cret")
    config = f"database: {{dsn: '{dsn}'}}"
    readable = start_cluster(1, dsn="", config=config)
    variable = start_cluster(1, dsn="", config="database: {dsn: '${THEIRS}'}", env={"THEIRS": dsn})
    for cluster, told in ((readable, True), (variable, False)):
        text = cluster.masters[0].log.read_text()
        assert ("settings-are-readable" in text) == told
        assert "s3cret" not in text
