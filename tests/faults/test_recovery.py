"""The commands of docs/recovery.md bring Loom back, as they are written there, with what it promises afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from harness import Cluster, documents, free_port, wait_until
from harness.cluster import ROOT
from harness.locks import acquire, release
from harness.postgres import SUPERUSER, binaries, query
from harness.work import BEADS, bead, team

from loom import embedded

START = """
mkdir -p /var/lib/postgresql/15 /var/backups
initdb --pgdata=/var/lib/postgresql/15/main --username={user} --encoding=UTF8 --locale=C --auth=trust --no-sync
cat >> /var/lib/postgresql/15/main/postgresql.conf <<'CONF'
listen_addresses = '127.0.0.1'
unix_socket_directories = '{folder}'
shared_buffers = '32MB'
CONF
pg_ctl start -D /var/lib/postgresql/15/main -l /var/backups/main.log -o '-p 5432'
createdb loom
"""


class Host:
    """Where the commands run: `folder` is its root, and the user may run PostgreSQL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {5432: free_port(), 5433: free_port()}
        self._prefix = embedded.user_prefix(folder, folder / "none")
        self.run(START.format(user=SUPERUSER, folder=folder))

    def dsn(self, *ports: int, database: str = "loom") -> str:
        """The connection string of the servers on these ports of the document."""
        hosts, real = ",".join(["127.0.0.1"] * len(ports)), ",".join(str(self.ports[port]) for port in ports)
        return f"postgresql:///{database}?user={SUPERUSER}&host={hosts}&port={real}&target_session_attrs=read-write"

    def run(self, text: str) -> str:
        """Run commands as the document has them, but for ports and folders, and return what they print."""
        for port, real in self.ports.items():
            text = text.replace(str(port), str(real))
        for path in ("/var/lib/postgresql", "/var/backups"):
            text = text.replace(path, f"{self.folder}{path}")
        env = {"PATH": f"{binaries()}:/usr/bin:/bin", "PGHOST": str(self.folder), "PGPORT": str(self.ports[5432])}
        env |= {"PGUSER": SUPERUSER, "PGDATABASE": "postgres", "LC_ALL": "C.UTF-8", "HOME": str(self.folder)}
        out = self.folder / "out"
        with out.open("w") as output:  # not a pipe, which the servers that it starts would keep open
            command = [*self._prefix, "bash", "-ec", text]
            done = subprocess.run(
                command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False, timeout=120
            )
        assert done.returncode == 0, out.read_text()
        return out.read_text()

    def stop(self) -> None:
        for data in self.folder.glob("var/lib/postgresql/15/*"):
            command = [*self._prefix, binaries() / "pg_ctl", "stop", "-m", "immediate", "-D", data]
            subprocess.run(command, capture_output=True, check=False)


@pytest.fixture
def host(folder: Path) -> Iterator[Host]:
    host = Host(folder)
    yield host
    for log in folder.glob("var/backups/*.log"):
        print(f"--- {log.name}\n{log.read_text()[-3000:]}")
    host.stop()


@pytest.fixture
def commands(request: pytest.FixtureRequest) -> list[str]:
    """The blocks of the document that name this test."""
    test = f"tests/faults/test_recovery.py::{request.node.name}"
    found = [block.text for block in documents.blocks((ROOT / "docs/recovery.md").read_text()) if test in block.tests]
    assert found
    return found


def beads(cluster: Cluster) -> set[str]:
    return {one["id"] for one in cluster.client(0).get(BEADS).json}


def last_event(cluster: Cluster) -> int:
    return cluster.client(0).get("/api/v1/events?after=0").json["next"]


def token(cluster: Cluster) -> int:
    """The token of one more grant."""
    grant = acquire(cluster.client(0))
    assert release(cluster.client(0), grant["fencing_token"]).status == 204
    return grant["fencing_token"]


def stop(cluster: Cluster) -> None:
    for master in cluster.masters:
        master.stop(timeout=30)


def test_a_dump_is_restored_into_a_new_database(
    host: Host, commands: list[str], start_cluster: Callable[..., Cluster]
) -> None:
    dump, restore = commands
    cluster = start_cluster(1, dsn=host.dsn(5432))
    team(cluster.client(0), "a")
    bead(cluster.client(0), "kept")
    cursor = last_event(cluster)
    tables = int(host.run(dump).split()[-1])
    stored = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
    assert query(host.dsn(5432), stored) == [(tables,)]
    bead(cluster.client(0), "lost")
    before = token(cluster)
    stop(cluster)
    assert host.run(restore).splitlines()[-3].split() == ["1", "|", str(cursor)]
    restored = start_cluster(1, dsn=host.dsn(5432, database="loom_restored"))
    assert beads(restored) == {"kept"}
    assert token(restored) > before
    bead(restored.client(0), "new")
    (event,) = restored.client(0).get(f"/api/v1/events?after={cursor}&type=bead.created").json["events"]
    assert event["entity_id"] == "new"


def test_the_database_returns_to_a_point_in_time(
    host: Host, commands: list[str], start_cluster: Callable[..., Cluster]
) -> None:
    once, back = commands
    cluster = start_cluster(1, dsn=host.dsn(5432))
    team(cluster.client(0), "a")
    host.run(once)
    cluster.wait_healthy()
    bead(cluster.client(0), "after-the-backup")
    cursor = last_event(cluster)
    moment: datetime = query(host.dsn(5432), "SELECT clock_timestamp()")[0][0]
    query(host.dsn(5432), "SELECT pg_sleep(0.1)")
    assert cluster.client(0).delete(f"{BEADS}/after-the-backup").status == 204
    bead(cluster.client(0), "too-late")
    before = token(cluster)
    stop(cluster)
    assert "2026-11-30 14:03:00+00" in back
    host.run(back.replace("2026-11-30 14:03:00+00", moment.isoformat(sep=" ")))
    wait_until(lambda: query(host.dsn(5433).partition("&target")[0], "SELECT pg_is_in_recovery()") == [(False,)], 30)
    restored = start_cluster(1, dsn=host.dsn(5433))
    assert beads(restored) == {"after-the-backup"}
    assert token(restored) > before
    assert restored.client(0).get(f"/api/v1/events?after={cursor}").json["events"] == []


def test_a_standby_takes_over_and_no_acknowledged_write_is_lost(
    host: Host, commands: list[str], start_cluster: Callable[..., Cluster]
) -> None:
    once, failover = commands
    cluster = start_cluster(2, dsn=host.dsn(5432, 5433))
    team(cluster.client(0), "a")
    host.run(once)
    streaming = "SELECT state, sync_state FROM pg_stat_replication"
    wait_until(lambda: query(host.dsn(5432), streaming) == [("streaming", "sync")], 20)
    for i in range(50):
        bead(cluster.client(i % 2), f"b{i}")
    before, cursor = token(cluster), last_event(cluster)
    host.run(failover)
    wait_until(lambda: cluster.client(0).get("/health").status == 200, 30)
    assert beads(cluster) == {f"b{i}" for i in range(50)}
    assert token(cluster) > before
    wait_until(lambda: cluster.client(1).post(BEADS, {"id": "new", "title": "t", "project_id": "p"}).status == 201, 30)
    assert cluster.client(1).get(f"/api/v1/events?after={cursor}").json["events"][0]["entity_id"] == "new"
