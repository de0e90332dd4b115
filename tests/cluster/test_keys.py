"""The `loom keys` command, and keys through nginx."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from harness import Cluster
from harness.postgres import binaries
from harness.processes import wait_until

LOCKS = "/api/v1/locks"


def loom(dsn: str, *words: str, status: int = 0) -> str:
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "loom", *words],
        env={**os.environ, "DATABASE_DSN": dsn},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return (done.stdout if status == 0 else done.stderr).strip()


def test_keys_are_made_listed_rotated_and_revoked_by_the_command(
    dsn: str, start_cluster: Callable[..., Cluster]
) -> None:
    cluster = start_cluster(2, nginx=True, config="security: {auth: on}")
    client = cluster.nginx_client()

    def status(key: str, method: str = "GET", path: str = LOCKS) -> int:
        return client.request(method, path, headers={"X-API-Key": key}).status

    assert client.get(LOCKS).status == 401
    admin = loom(dsn, "keys", "create", "ops", "--role", "admin")
    agent = loom(dsn, "keys", "create", "agent-7", "--role", "agent", "--days", "90", "--note", "vm 7")
    assert (status(admin), status(agent), status(agent, "GET", "/api/v1/keys")) == (200, 200, 403)
    listed = loom(dsn, "keys", "list")
    assert [line.split()[-1] for line in listed.splitlines()[1:]] != []
    assert admin not in listed
    assert agent.split("_")[1] in listed
    new = loom(dsn, "keys", "rotate", agent.split("_")[1], "--overlap-hours", "1")
    assert (status(agent), status(new)) == (200, 200)
    loom(dsn, "keys", "revoke", new.split("_")[1])
    wait_until(lambda: status(new) == 401, 15)
    for words in (("create", "system:x", "--role", "agent"), ("revoke", "none"), ("create", "a/b", "--role", "agent")):
        assert loom(dsn, "keys", *words, status=1).startswith("Error: ")

    # No key is in a log line, in a table, or in the arguments of a process.
    texts = [path.read_text(errors="replace") for path in cluster.folder.rglob("*.log")]
    assert '"caller":"agent-7"' in "".join(texts)
    dump = subprocess.run([binaries() / "pg_dump", "--data-only", dsn], capture_output=True, text=True, check=True)
    assert "agent-7" in dump.stdout
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            texts.append(process.read_text(errors="replace"))
    for key in (admin, agent, new):
        assert not [text for text in (*texts, dump.stdout) if key.split("_")[2] in text]


def test_by_default_nginx_tells_who_is_on_this_host(start_cluster: Callable[..., Cluster]) -> None:
    client = start_cluster(1, nginx=True).nginx_client()
    assert client.get(LOCKS).status == 200
    assert client.get(LOCKS, headers={"X-Real-IP": "192.0.2.7", "X-Forwarded-For": "192.0.2.7"}).status == 200


def test_nginx_limits_each_key_and_not_this_host(dsn: str, start_cluster: Callable[..., Cluster]) -> None:
    """With a hundredth of the rate, so that one client reaches it."""
    cluster = start_cluster(1, nginx=True, nginx_changes={"rate=500r/s": "rate=5r/s", "burst=1000": "burst=20"})
    client = cluster.nginx_client()
    one, other = (loom(dsn, "keys", "create", name, "--role", "reader") for name in ("one", "other"))
    answers = [client.get(LOCKS, headers={"X-API-Key": one}) for _ in range(60)]
    refused = [answer for answer in answers if answer.status == 429]
    assert refused
    assert (refused[0].headers["Retry-After"], refused[0].json["type"]) == ("1", "/problems/too-many-requests")
    assert client.get(LOCKS, headers={"Authorization": f"Bearer {other}"}).status == 200
    assert {client.get(LOCKS).status for _ in range(60)} == {200}, "this host, without a key"
    assert "nginx/" not in client.get("/health").headers.get("Server", "")
