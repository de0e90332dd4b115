"""docs/ is a site without a broken link."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness.cluster import ROOT


def build(tree: Path, folder: Path) -> str:
    """Build the site into `folder`; any warning is a fault."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", tree / "deploy/site/mkdocs.yml", "-d", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.all
def test_the_site_has_every_page_and_no_broken_link(tmp_path: Path) -> None:
    build(ROOT, tmp_path)
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in (ROOT / "docs").rglob("*.md")}
    made = {str(page.relative_to(tmp_path).with_suffix("")) for page in tmp_path.rglob("*.html")} - {"404"}
    assert made == {page.replace("README", "index") for page in pages}
    nav = (ROOT / "deploy/site/mkdocs.yml").read_text()
    assert {page for page in pages if f"{page}.md" not in nav} == set()


@pytest.mark.all
def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    for name in ("docs", "deploy"):
        shutil.copytree(ROOT / name, tmp_path / name)
    page = tmp_path / "docs/recovery.md"
    page.write_text(page.read_text().replace("(#a-dump)", "(#no-dump)"))
    with pytest.raises(AssertionError, match="no-dump"):
        build(tmp_path, tmp_path / "site")
