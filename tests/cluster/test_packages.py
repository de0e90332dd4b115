"""Loom is installed from its wheel, and then needs nothing of the checkout."""

from __future__ import annotations

import configparser
import contextlib
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cluster, Process, free_port, wait_until
from harness.client import Client
from harness.cluster import ROOT
from harness.locks import acquire

CHECKOUT_ONLY = ".venv", "var", ".git", "node_modules", "__pycache__", "*.egg-info", "build", "dist", "config.yaml"
REQUIREMENTS = ROOT / "deploy/requirements.txt"


def copy(folder: Path) -> Path:
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*CHECKOUT_ONLY))


def run(*command: str | Path) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout


def wheel(source: Path) -> Path:
    """Build the sdist, and the wheel from the sdist."""
    run(sys.executable, "-m", "build", "--outdir", source / "dist", source)
    assert len(list((source / "dist").glob("loom-*.tar.gz"))) == 1
    (built,) = (source / "dist").glob("loom-*.whl")
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(copy(tmp_path_factory.mktemp("sdist") / "source"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a virtual environment with the packages that Loom needs, but no PostgreSQL."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    run(folder / "bin/pip", "install", "-q", "--require-hashes", "-r", REQUIREMENTS)
    return folder / "bin"


def install(bare: Path, built: Path) -> None:
    run(bare / "pip", "install", "-q", "--no-deps", "--force-reinstall", built)
    run(bare / "pip", "check")


def serve(bare: Path, folder: Path) -> None:
    """Start `loom serve` in an empty folder, take a lock, and stop it. Fails with the log if it does not serve."""
    if not any(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL in /usr/lib/postgresql")
    port = free_port()
    (folder / "empty").mkdir()
    env = {"PORT": str(port), "PYTHONPATH": "", "LOOM_CONFIG": "", "DATABASE_DSN": ""}
    process = Process([bare / "loom", "serve"], folder / "log", env=env, cwd=folder / "empty")
    client = Client(port, 10)

    def serves() -> bool:
        assert process.runs, process.last_lines()
        with contextlib.suppress(OSError):
            return client.get("/health").status == 200
        return False

    try:
        wait_until(serves, 30)
        acquire(client, owner="a")
        assert {entry.name for entry in (folder / "empty").iterdir()} == {"var"}
    finally:
        client.close()
        process.stop(timeout=30)


@pytest.mark.all
def test_the_wheel_runs_in_a_bare_environment_from_an_empty_folder(built: Path, bare: Path, folder: Path) -> None:
    install(bare, built)
    serve(bare, folder)


@pytest.mark.all
def test_a_wheel_without_the_schema_is_detected(bare: Path, folder: Path) -> None:
    source = copy(folder / "source")
    (source / "setup.cfg").write_text((source / "setup.cfg").read_text().replace("    schema.sql\n", ""))
    install(bare, wheel(source))
    with pytest.raises(AssertionError, match=r"schema\.sql: neither in .*; install Loom again"):
        serve(bare, folder)


@pytest.mark.all
def test_the_wheel_adds_one_name_to_site_packages(built: Path) -> None:
    """A module `app` there would be imported in place of an application's own."""
    names = {name.partition("/")[0] for name in zipfile.ZipFile(built).namelist()}
    assert {re.sub(r"-.*\.", ".", name) for name in names} == {"loom", "loom.data", "loom.dist-info"}


def test_the_requirements_are_the_tested_versions_of_what_loom_imports() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+) \\$", REQUIREMENTS.read_text(), re.MULTILINE))
    tested = dict(re.findall(r"^([\w-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    normal = {name.lower().replace("_", "-"): version for name, version in tested.items()}
    assert pinned == {name: normal[name] for name in pinned}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert pinned.keys() >= set(re.findall(r"^[\w-]+", setup["options"]["install_requires"], re.MULTILINE))


def test_a_gunicorn_that_was_not_tried_is_named_in_the_log(
    start_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import gunicorn\ngunicorn.__version__ = '28.1.0'\n")
    log = start_cluster(1, env={"PYTHONPATH": str(tmp_path)}).masters[0].log.read_text()
    (found,) = [json.loads(line) for line in log.splitlines() if "gunicorn-not-tried" in line]
    assert (found["version"], found["tried"]) == ("28.1.0", "27.0.")
    assert "gunicorn-not-tried" not in start_cluster(1).masters[0].log.read_text()
