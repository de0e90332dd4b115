"""The log tells of an outage when it begins and when it ends, and names what is wrong in the DSN."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

from harness import Cluster, Postgres, wait_until

TRIES = 12  # attempts to connect: several seconds


def warnings(log: Path) -> list[dict[str, str]]:
    """The lines of a log above info."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["level"] != "info"]


def count_attempts(address: tuple[str, int], attempts: int) -> None:
    """Listen in place of the server, and hang up on each attempt to connect."""
    with socket.create_server(address) as listener:
        listener.settimeout(20)
        for _ in range(attempts):
            listener.accept()[0].close()


def test_an_outage_is_logged_when_it_begins_and_when_it_ends(
    own_postgres: Postgres, start_cluster: Callable[..., Cluster]
) -> None:
    name = own_postgres.database()
    cluster = start_cluster(2, dsn=own_postgres.dsn(name, tcp=True))
    cluster.wait_healthy()
    own_postgres.stop()
    count_attempts((own_postgres.address, own_postgres.port), 2 * TRIES)
    own_postgres.start()
    cluster.wait_healthy(2)
    for master in cluster.masters:
        wait_until(lambda log=master.log: "database-back" in log.read_text())
        assert [line["event"] for line in warnings(master.log)] == ["database-away", "database-back"]


def test_what_is_wrong_in_a_dsn_is_named_once(
    start_postgres: Callable[..., Postgres], start_cluster: Callable[..., Cluster]
) -> None:
    server = start_postgres(settings={"log_connections": "on"})
    name = server.database()
    server.query("CREATE ROLE guest LOGIN PASSWORD 'letmein'")
    server.query("CREATE ROLE stranger LOGIN")
    server.query(f"REVOKE CONNECT ON DATABASE {name} FROM public")
    rules = server.data / "pg_hba.conf"
    rules.write_text(f"host all guest all md5\n{rules.read_text()}")
    server.query("SELECT pg_reload_conf()")
    wrong = {
        "database.dsn: the role or its password is wrong: ": {"user": "guest", "password": "hunter22"},
        "database.dsn: the password is missing: ": {"user": "guest"},
        "database.dsn: there is no such role: ": {"user": "nobody_here"},
        "database.dsn: there is no such database: ": {"database": "nothing_here"},
        "": {"user": "stranger"},  # a refusal that has no text of ours
    }
    clusters = [start_cluster(1, dsn=server.dsn(**{"database": name, "tcp": True, **part})) for part in wrong.values()]
    before = server.log.read_text().count("connection received")
    wait_until(lambda: server.log.read_text().count("connection received") > before + TRIES * len(wrong), 20)
    for problem, cluster in zip(wrong, clusters, strict=True):
        (line,) = warnings(cluster.masters[0].log)
        assert line["event"] == "database-away"
        assert line["reason"].startswith(f"{problem}connection to server at ")
        assert cluster.client(0).get("/health").json["dependencies"]["database"]["message"] == line["reason"]
        assert "hunter22" not in cluster.masters[0].log.read_text()
    assert "permission denied for database" in line["reason"]
