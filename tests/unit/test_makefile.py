"""`make clean` and `make wipe` delete what they say, and nothing while a server runs."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

import pytest

from loom.config import resource


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an installation and the data of a server."""
    (tmp_path / "Makefile").write_text(resource("Makefile").read_text())
    for file in ("var/postgres/data/PG_VERSION", "var/postgres/launcher", ".venv/bin/python", ".ruff_cache/x"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


def make(folder: Path, target: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", target], cwd=folder, input=answer, capture_output=True, text=True, check=False)


def left(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {"Makefile"}


def test_clean_keeps_the_data(checkout: Path) -> None:
    assert make(checkout, "clean").returncode == 0
    assert left(checkout) == {"var"}
    assert (checkout / "var/postgres/data/PG_VERSION").exists()


@pytest.mark.parametrize("answer", ["y\n", "yes\n"])
def test_wipe_deletes_the_data_after_a_yes(checkout: Path, answer: str) -> None:
    run = make(checkout, "wipe", answer)
    assert (run.returncode, "[y/N]" in run.stdout) == (0, True)
    assert left(checkout) == {".venv", ".ruff_cache"}


@pytest.mark.parametrize("answer", ["", "\n", "n\n", "nothing\n", " \n"])
def test_wipe_deletes_nothing_after_anything_else(checkout: Path, answer: str) -> None:
    assert make(checkout, "wipe", answer).returncode != 0
    assert left(checkout) == {"var", ".venv", ".ruff_cache"}


@pytest.mark.parametrize("target", ["clean", "wipe"])
def test_nothing_is_deleted_while_a_server_runs(checkout: Path, target: str) -> None:
    with (checkout / "var/postgres/launcher").open("r+") as launcher:
        fcntl.flock(launcher, fcntl.LOCK_EX)
        run = make(checkout, target, "y\n")
    assert run.returncode != 0
    assert "stop Loom first" in run.stderr
    assert left(checkout) == {"var", ".venv", ".ruff_cache"}
