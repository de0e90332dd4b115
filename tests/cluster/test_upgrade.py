"""An upgrade and the way back, instance by instance behind nginx, while clients work."""

from __future__ import annotations

import contextlib
import io
import itertools
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Postgres, Process, free_port, wait_until
from harness.client import Client
from harness.cluster import ROOT, Nginx
from harness.load import Caller, Load, get
from harness.work import bead, team


def git(*arguments: str) -> bytes:
    run = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, check=False)
    if run.returncode:
        pytest.skip(f"this is no checkout of git: {run.stderr.decode()}")
    return run.stdout


@pytest.fixture
def former(folder: Path) -> Path:
    """This tree with another schema.sql, so that each change of tree applies the schema to the running database.

    Two commits of the history may differ by more: nothing is released yet, so functions still change their parameters.
    """
    with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD"))) as archive:
        archive.extractall(folder / "former")  # as it is committed
    with (folder / "former/schema.sql").open("a") as file:
        file.write("-- of the former release\n")
    return folder / "former"


class Instances:
    """Three instances, each of which runs one tree or another, and nginx."""

    def __init__(self, dsn: str, folder: Path, tree: Path) -> None:
        self.ports = [free_port() for _ in range(3)]
        self._dsn, self._folder = dsn, folder
        self._processes = [self._start(i, tree) for i in range(3)]
        for i in range(3):
            self.wait_ready(i)
        self.nginx = Nginx(folder, self.ports)

    def _start(self, i: int, tree: Path) -> Process:
        (self._folder / "config.yaml").write_text("")
        env = {"DATABASE_DSN": self._dsn, "PORT": str(self.ports[i]), "PYTHONPATH": str(tree)}
        env["LOOM_CONFIG"] = str(self._folder / "config.yaml")
        command = [sys.executable, "-m", "gunicorn", "-c", tree / "gunicorn.conf.py", "app:app"]
        return Process(command, self._folder / f"{i}.log", env=env, cwd=tree)

    def wait_ready(self, i: int) -> None:
        def ready() -> bool:
            assert self._processes[i].runs, self._processes[i].last_lines()
            with contextlib.suppress(OSError), contextlib.closing(Client(self.ports[i], 5)) as client:
                return client.get("/health/ready").status == 200
            return False

        wait_until(ready, 30, 0.05)

    def change(self, tree: Path) -> None:
        """Restart each with another tree, each when the one before serves again."""
        for i in range(3):
            self._processes[i].stop(timeout=40)
            self._processes[i] = self._start(i, tree)
            self.wait_ready(i)

    def close(self) -> None:
        self.nginx.close()
        for i, process in enumerate(self._processes):
            process.stop(timeout=30)
            print(f"--- instance {i}\n{process.last_lines(10)}")


@pytest.fixture
def instances(postgres: Postgres, former: Path, folder: Path) -> Iterator[Instances]:
    name = postgres.empty_database()
    instances = Instances(postgres.dsn(name), folder, former)
    yield instances
    instances.close()
    postgres.drop(name)


def work(agent: str) -> Callable[[Caller], object]:
    """Creates, claims and completes beads."""
    names = itertools.count()

    def job(call: Caller) -> None:
        name = f"{agent}-{next(names)}"
        call("POST", "/api/v1/beads", {"id": name, "title": "t", "project_id": "p"})
        claimed = call("POST", f"/api/v1/beads/{name}/claim", {"agent_id": agent})
        if claimed is not None and claimed.status == 200:
            call("POST", f"/api/v1/beads/{name}/complete", {"fencing_token": claimed.json["fencing_token"]})

    return job


@pytest.mark.all
def test_an_upgrade_and_the_way_back_fail_no_request(instances: Instances, former: Path) -> None:
    client = Client(instances.nginx.url)
    agents = [f"a{i}" for i in range(4)]
    team(client, *agents)
    bead(client, "before")
    with Load([instances.nginx.url], [*map(work, agents), get("/api/v1/beads?limit=5")], pause=0.005) as load:
        instances.change(ROOT)
        instances.change(former)
        instances.change(ROOT)
    failed = [call for call in load.calls if call.status not in (200, 201)]
    print(f"of {len(load.calls)} requests failed: {len(failed)}")
    assert failed == []
    assert len(load.calls) > 500
    assert client.get("/api/v1/beads/before").status == 200
    client.close()
