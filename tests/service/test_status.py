"""`loom status`: an operator sees in one sentence whether all is well, and what is not, also without an instance."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner, Result
from harness import AppClient, Postgres, wait_until
from harness.locks import Sql
from harness.work import bead, claim, patch, team

from loom.cli import main
from loom.instances import Instance


def status(dsn: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["status", *options], env={"DATABASE_DSN": dsn, "LOOM_CONFIG": os.devnull})


def seen(dsn: str) -> Any:
    return json.loads(status(dsn, "--json").stdout)


def test_it_shows_who_holds_what(dsn: str, client: AppClient, instance: Instance) -> None:
    team(client, "coder")
    bead(client, "late")
    claim(client, "late", "coder", lease_seconds=30)
    bead(client, "next")
    bead(client, "stuck")
    patch(client, "stuck", status="blocked")
    token = client.post("/api/v1/locks/build[red]", {"owner": "a", "ttl_seconds": 60}).json["fencing_token"]
    client.post("/api/v1/locks/build[red]", {"owner": "b", "wait_seconds": 1})

    result = status(dsn)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("All is well: 1 instance is active.\n")
    assert f"{instance.hostname}:8080  active" in result.stdout
    assert re.search(rf"^build\[red\] +a +{token} .* s +1$", result.stdout, re.MULTILINE)
    assert re.search(r"^late +coder +in \d\d s", result.stdout, re.MULTILINE)

    answer = seen(dsn)
    assert answer["beads"] == {"open": 1, "in_progress": 1, "blocked": 1, "deferred": 0, "closed": 0, "ready": 1}
    assert [(row["lock_name"], row["waiting"]) for row in answer["locks"]] == [("build[red]", 1)]
    assert [row["id"] for row in answer["leases"]] == ["late"]
    assert [row["instance_id"] for row in answer["instances"]] == [instance.instance_id]


def test_without_an_instance_it_says_that_nothing_is_served(dsn: str) -> None:
    result = status(dsn)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (1, "Nothing is served: no instance is active.")


@pytest.mark.usefixtures("server_age")
def test_a_dead_instance_is_named(dsn: str, sql: Sql, instance: Instance) -> None:
    sql("""INSERT INTO instances (instance_id, hostname, last_heartbeat, metadata)
           VALUES (gen_random_uuid(), 'far', clock_timestamp() - interval '75 s', '{"port": 8081}')""")
    answer = seen(dsn)
    assert not answer["healthy"]
    assert answer["summary"] == "1 instance is active; far:8081 is dead, silent for 75 s."
    assert status(dsn).exit_code == 1


def test_a_database_that_is_away_or_has_no_schema_is_one_line(postgres: Postgres) -> None:
    result = status("postgresql://u:hunter22@127.0.0.1:9/db", "--json")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "hunter22" not in result.output
    assert "Connection refused" in result.stderr
    assert "run loom migrate" in status(postgres.dsn("postgres")).stderr


def test_a_watch_goes_on_after_an_outage(own_postgres: Postgres) -> None:
    dsn = own_postgres.dsn(own_postgres.database())
    command = [sys.executable, "-m", "loom", "status", "--watch", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "DATABASE_DSN": dsn, "LOOM_CONFIG": os.devnull}
    ) as watch:
        assert watch.stdout is not None
        next_look = lambda: json.loads(watch.stdout.readline())["summary"]  # type: ignore[union-attr]  # noqa: E731
        assert next_look().startswith("Nothing is served")
        own_postgres.stop()
        wait_until(lambda: "refused" in next_look() or "No such file" in next_look(), 20)
        own_postgres.start()
        wait_until(lambda: next_look().startswith("Nothing is served"), 20)
        watch.terminate()
