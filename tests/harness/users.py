"""Processes of an ordinary user."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loom

NOBODY = 65534
ROOT = Path(loom.__file__).parents[1]


def as_nobody() -> dict[str, Any]:
    """Return options of Popen that start Python as an ordinary user, or skip the test when no such user can run it.

    Uses the system's Python of the same version when ours is in a home folder that others cannot read.
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        options: dict[str, Any] = {"executable": python, "user": NOBODY, "group": NOBODY, "extra_groups": []}
        options["env"] = environ
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", "import loom.embedded"], check=False, **options).returncode == 0:
                return options
    return pytest.skip("other users cannot run this Python")
