"""The image is built by the real Dockerfile, without an engine: buildah builds and runs it in a chroot."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Postgres, Process, free_port, program, wait_until
from harness.client import Client
from harness.cluster import ROOT
from harness.postgres import query

BASE = "docker.io/library/python:3.13-slim"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def run(*command: str | Path, seconds: int = 500) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=seconds
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An image of the name that the Dockerfile asks for: Debian with Python, since no registry can be reached here."""
    if os.geteuid() != 0:
        pytest.skip("only root can build in a chroot")
    for name, package in (("buildah", "buildah"), ("podman", "podman"), ("debootstrap", "debootstrap")):
        program(name, package)
    if BASE in run("buildah", "images", "--format", "{{.Name}}:{{.Tag}}"):
        return
    folder = tmp_path_factory.mktemp("base")
    try:
        run("debootstrap", "--variant=minbase", "--include=python3,python3-pip,python3-venv", "bookworm", folder)
    except (AssertionError, subprocess.TimeoutExpired) as exc:
        pytest.skip(f"debootstrap cannot make a base here: {str(exc).strip().splitlines()[-1]}")
    if CERTIFICATES.exists():  # of this machine, which may have a registry of packages with an authority of its own
        (folder / "etc/ssl/certs").mkdir(parents=True, exist_ok=True)
        shutil.copy(CERTIFICATES, folder / "etc/ssl/certs")
        (folder / "etc/pip.conf").write_text(f"[global]\ncert = {CERTIFICATES}\n")
    run("sh", "-c", f"tar -C {folder} -c . | podman import - {BASE}")
    shutil.rmtree(folder)
    probe = run("buildah", "from", "--pull-never", BASE).strip()
    try:
        run("buildah", "run", "--isolation", "chroot", probe, "--", "true")
    except AssertionError as exc:
        pytest.skip(f"buildah can run nothing here: {str(exc).strip().splitlines()[-1]}")
    finally:
        run("buildah", "rm", probe)


@pytest.fixture(scope="module")
def container(base: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A container of an image that was built from a folder with secrets in it."""
    source = tmp_path_factory.mktemp("context")
    unwanted = shutil.ignore_patterns(".venv", "var", ".git", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=unwanted, dirs_exist_ok=True)
    (source / "config.yaml").write_text("database: {dsn: 'host=secret'}\n")
    (source / "var").mkdir()
    (source / "var/data").write_text("secret\n")
    name = f"loom-test-{os.getpid()}"
    options = ["--isolation", "chroot", "--pull-never", "--format", "docker"]
    run("buildah", "bud", *options, "-f", source / "deploy/docker/Dockerfile", "-t", name, source)
    yield run("buildah", "from", "--pull-never", f"localhost/{name}").strip()
    run("buildah", "rm", "--all")
    run("buildah", "rmi", f"localhost/{name}")


@pytest.mark.all
def test_nothing_but_loom_is_in_the_image(container: str) -> None:
    found = run("buildah", "run", "--isolation", "chroot", container, "--", "find", "/opt/loom/share", "/tmp")
    assert "schema.sql" in found
    assert not [line for line in found.splitlines() if line.endswith(("/config.yaml", "/var", ".git", "/tests"))]
    assert "uid=10001" in run("buildah", "run", "--isolation", "chroot", container, "--", "id")


@pytest.mark.all
def test_the_guides_environment_is_enough_and_the_container_can_be_reached(
    container: str, postgres: Postgres, database_name: str, tmp_path: Path
) -> None:
    port = free_port()
    dsn = postgres.dsn(database_name, tcp=True)
    variables = ["DATABASE_TYPE=postgres", f"DATABASE_DSN={dsn}", f"PORT={port}"]
    inside = ["buildah", "run", "--isolation", "chroot", container, "--", "env", *variables, "loom"]
    with pytest.raises(AssertionError, match=f"port {port} on 0.0.0.0 does not answer"):
        run(*inside, "health")
    process = Process([*inside, "serve"], tmp_path / "log")
    client = Client(f"http://127.0.0.2:{port}")  # an address on which a listener on 127.0.0.1 is not reached

    def healthy() -> bool:
        assert process.runs, process.last_lines()
        with contextlib.suppress(OSError):
            return client.get("/health").status == 200
        return False

    try:
        wait_until(healthy, 60, 0.1)
        assert '"healthy":true' in run(*inside, "health").replace(" ", "")
    finally:
        client.close()
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    assert query(postgres.dsn(database_name), "SELECT 1 FROM instances") == []
