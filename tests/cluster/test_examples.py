"""The programs in examples/ run as they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from harness import MARGIN, Cluster, Process, wait_until
from harness.cluster import ROOT
from harness.loom_client import client_of

EXAMPLES = ROOT / "examples"


def test_the_agent_works_in_thirty_lines_and_stops_on_sigterm(
    start_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = start_cluster(1)
    client, program = client_of(cluster), EXAMPLES / "agent.py"
    assert len(program.read_text().splitlines()) <= 30
    env = {"LOOM_SERVER": f"http://127.0.0.1:{cluster.ports[0]}"}
    agent = Process([sys.executable, program], tmp_path / "log", env=env)
    wait_until(lambda: any(row["id"] == "coder-1" for row in client.agents.list()))
    bead = client.beads.create(title="Deploy it", project_id="demo")["id"]
    wait_until(lambda: client.beads.get(bead)["status"] == "closed")
    assert client.beads.get(bead)["context"] == {"result": "deployed"}
    assert [comment["content"] for comment in client.list_bead_comments(bead)] == ["Deployed"]
    agent.send(signal.SIGTERM)
    assert agent.wait(10 + MARGIN) == 0


def test_a_fleet_completes_each_bead_once_while_its_processes_are_killed_and_frozen(
    start_cluster: Callable[..., Cluster],
) -> None:
    cluster = start_cluster(2)
    servers = ",".join(f"http://127.0.0.1:{port}" for port in cluster.ports)
    command = [sys.executable, str(EXAMPLES / "fleet.py"), "--agents", "20", "--beads", "60"]
    env = {**os.environ, "LOOM_SERVER": servers}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=True)
    assert run.stdout.splitlines()[-1] == "60 beads, each completed once: True", run.stdout


def test_the_configuration_for_coding_agents_starts_a_command_that_exists() -> None:
    (loom,) = json.loads((EXAMPLES / "mcp.json").read_text())["mcpServers"].values()
    program = Path(sys.executable).with_name(loom["command"])
    run = subprocess.run([program, loom["args"][0], "--help"], capture_output=True, text=True, check=True)
    for option in (word for word in loom["args"] if word.startswith("--")):
        assert option in run.stdout
