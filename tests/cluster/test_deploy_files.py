"""Each file under deploy/ is accepted by the program that it is for, which refuses a broken copy."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Postgres, free_port, program
from harness.cluster import ROOT
from harness.postgres import binaries

DEPLOY = ROOT / "deploy"


def run(*command: str | Path, text: str | None = None) -> str:
    """Return what the program prints. Raises AssertionError with it when the program reports a fault."""
    done = subprocess.run(
        command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def broken(file: Path, old: str, new: str, folder: Path) -> Path:
    """A copy with a fault."""
    text = file.read_text()
    assert old in text
    copy = folder / file.name
    copy.write_text(text.replace(old, new, 1))
    return copy


# PostgreSQL

SETTINGS = DEPLOY / "postgres/loom.conf"


def shown(server: Postgres, file: Path) -> dict[str, str]:
    """Each setting of the file as the server understands it."""
    server.stop()
    with (server.data / "postgresql.conf").open("a") as conf:
        conf.write(file.read_text())
    names = re.findall(r"^([a-z_]+) =", file.read_text(), re.MULTILINE)
    return {name: server.run("postgres", "-D", str(server.data), "-C", name).strip() for name in names}


FOLDERS = [binaries(), *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_postgresql_accepts_our_settings(start_postgres: Callable[..., Postgres], folder: Path) -> None:
    settings = shown(start_postgres(programs=folder), SETTINGS)
    assert (settings["autovacuum_naptime"], settings["shared_buffers"], len(settings)) == ("2", "32768", 14)


@pytest.mark.parametrize(("old", "new"), [("256MB", "256 Megabytes"), ("shared_buffers", "shared_bufers")])
def test_postgresql_refuses_a_broken_copy(own_postgres: Postgres, tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        shown(own_postgres, broken(SETTINGS, old, new, tmp_path))


# nginx


def nginx_check(file: Path, folder: Path) -> str:
    text = re.sub(r"listen [^;]*;", f"listen 127.0.0.1:{free_port()};", file.read_text())
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(f"{user} pid {folder}/pid; events {{ }}\nhttp {{ {text} }}")
    return run(program("nginx", "nginx"), "-t", "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr")


def test_nginx_accepts_our_configuration_without_a_warning(tmp_path: Path) -> None:
    assert "warn" not in nginx_check(ROOT / "nginx/loom.conf", tmp_path)


def test_nginx_refuses_a_broken_copy(tmp_path: Path) -> None:
    copy = broken(ROOT / "nginx/loom.conf", "least_conn;", "least_connections;", tmp_path)
    with pytest.raises(AssertionError, match="unknown directive"):
        nginx_check(copy, tmp_path)


# HAProxy


def haproxy_check(file: Path) -> str:
    return run(program("haproxy", "haproxy"), "-c", "-dW", "-f", file)


def test_haproxy_accepts_our_configuration_without_a_warning() -> None:
    assert "valid" in haproxy_check(DEPLOY / "haproxy/haproxy.cfg")


def test_haproxy_refuses_a_broken_copy(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="leastcon"):
        haproxy_check(broken(DEPLOY / "haproxy/haproxy.cfg", "leastconn", "leastcon", tmp_path))
