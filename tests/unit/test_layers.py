"""The layers are kept: no module imports from a layer above, and only one module reads the environment."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import loom

ROOT = Path(loom.__file__).parents[1]
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv"}


def test_no_module_imports_from_a_layer_above():
    command = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([str(command), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 broken" in run.stdout


def readers(source: str) -> set[str]:
    """The names by which a module reads the environment."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found.update(alias.name for alias in node.names)
    return found & ENVIRONMENT


def test_only_the_configuration_reads_the_environment():
    modules = [*ROOT.glob("loom/**/*.py"), ROOT / "app.py", ROOT / "gunicorn.conf.py"]
    using = {str(module.relative_to(ROOT)) for module in modules if readers(module.read_text())}
    assert using == {"loom/config.py"}


def test_the_check_detects_both_ways_to_read_the_environment():
    assert readers("import os\nos.environ['X']") == {"environ"}
    assert readers("from os import getenv") == {"getenv"}
