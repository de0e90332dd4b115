"""The tooz driver passes the tests that tooz has for its own drivers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Cluster

# The module of the tests imports all of tooz's drivers, which need libraries that are not installed. It also starts
# processes, which import it again: hence a sitecustomize.
STAND_INS = """
import sys
from unittest.mock import MagicMock
for name in "etcd3gw pymemcache pymemcache.client redis redis.commands redis.commands.core sysv_ipc".split():
    sys.modules[name] = MagicMock(KEY_MIN=-2**31, KEY_MAX=2**31)
"""

pytestmark = pytest.mark.all


def test_the_tests_of_tooz_pass(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("tooz")
    url = f"loom://{','.join(f'127.0.0.1:{port}' for port in cluster.ports)}"
    command = [sys.executable, "-m", "unittest", "tooz.tests.test_coordination"]
    (tmp_path / "sitecustomize.py").write_text(STAND_INS)
    env = {**os.environ, "TOOZ_TEST_URL": url, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    print(run.stderr[-20_000:])
    passed = re.search(r"Ran (\d+) tests", run.stderr)
    assert run.returncode == 0
    assert passed is not None
    skipped = re.search(r"skipped=(\d+)", run.stderr)
    assert int(passed[1]) - int(skipped[1] if skipped else 0) >= 60
