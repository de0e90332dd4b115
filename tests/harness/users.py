"""Being somebody else than root."""

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
    """Return options of Popen that start Python as an ordinary user; skips where the environment is closed to others.

    Takes the system's Python of our version when ours is in a closed home folder.
    """
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        options: dict[str, Any] = {"executable": python, "user": NOBODY, "group": NOBODY, "extra_groups": []}
        options["env"] = environ
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", "import loom.embedded"], check=False, **options).returncode == 0:
                return options
    return pytest.skip("this environment is closed to other users")
