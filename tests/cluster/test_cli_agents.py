"""The commands for agents and people: what they do, print and answer, as documented in docs/cli.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from harness import Cluster, wait_until
from harness.loom_client import client_of, team_of

Loom = Callable[..., tuple[int, Any]]


def loom_of(cluster: Cluster) -> Loom:
    env = {**os.environ, "LOOM_SERVER": f"http://127.0.0.1:{cluster.ports[0]}", "LOOM_AGENT": "ann"}

    def loom(*words: str, plain: bool = False) -> tuple[int, Any]:
        command = [sys.executable, "-m", "loom", *words, *([] if plain else ["--json"])]
        run = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        assert "Traceback" not in run.stderr, run.stderr
        return run.returncode, run.stdout if plain else run.stdout and json.loads(run.stdout)

    return loom


def test_an_agent_works_with_nothing_but_the_command(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    loom = loom_of(cluster)
    team_of(client_of(cluster))
    assert loom("agent", "add", "ann", "--project", "p")[1]["id"] == "ann"
    one = loom("bead", "add", "First", "--project", "p", "--priority", "0", "--tag", "x")[1]
    two = loom("bead", "add", "Second", "--project", "p", "--blocked-by", one["id"])[1]
    assert [bead["id"] for bead in loom("bead", "ready")[1]] == [one["id"]]
    status, claimed = loom("bead", "claim")
    assert (status, claimed["bead"]["id"]) == (0, one["id"])
    assert loom("bead", "claim") == (5, "")
    beat = loom("agent", "heartbeat", "ann", "--claim", f"{one['id']}={claimed['fencing_token']}", "--claim", "none=1")
    assert (beat[0], list(beat[1]["extended"]), list(beat[1]["lost"])) == (4, [one["id"]], ["none"])
    assert loom("bead", "fail", one["id"], "--reason", "tests", "--retry-after", "0")[1]["failures"] == 1
    assert loom("bead", "complete", one["id"])[0] == 4  # not claimed
    assert loom("bead", "claim", one["id"])[0] == 0
    assert loom("bead", "complete", one["id"], "--token", str(claimed["fencing_token"]))[0] == 4  # an old token
    assert loom("bead", "complete", one["id"], "--reason", "done")[1]["status"] == "closed"
    assert loom("bead", "claim")[1]["bead"]["id"] == two["id"]
    assert loom("bead", "release", two["id"])[0] == 0
    three = loom("bead", "add", "Third", "--project", "p")[1]["id"]
    assert loom("bead", "dep", two["id"], three)[1]["blocked_by"] == [one["id"], three]
    assert [node["id"] for node in loom("bead", "tree", two["id"])[1]["waits_for"]] == [one["id"], three]
    assert loom("bead", "dep", "--remove", two["id"], three)[1]["blocked_by"] == [one["id"]]
    assert loom("bead", "history", two["id"])[1][-1]["type"] == "bead.created"
    assert loom("bead", "show", "none") == (3, "")
    assert {bead["id"] for bead in loom("bead", "ls", "--status", "open")[1]} == {two["id"], three}
    assert loom("agent", "ls")[1][0]["id"] == "ann"
    assert loom("config", "set", "reviewers", "2")[1]["value"] == 2
    assert loom("config", "get", "reviewers")[1]["value"] == 2
    assert loom("config", "unset", "reviewers") == (1, "")  # nobody is there to be asked
    assert loom("config", "unset", "reviewers", "--yes")[0] == 0
    assert loom("config", "get", "reviewers")[0] == 3
    assert loom("agent", "rm", "ann", "--yes")[0] == 0
    table = loom("bead", "ls", plain=True)[1]
    assert "Second" in table
    assert "\x1b" not in table
    assert loom("lock", "run")[0] == 2


def test_events_are_followed_and_ids_complete_in_shells(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    client = client_of(cluster)
    team_of(client, "ann")
    env = {**os.environ, "LOOM_SERVER": f"http://127.0.0.1:{cluster.ports[0]}"}
    follow = [sys.executable, "-m", "loom", "events", "--follow", "--json", "--type", "bead.created"]
    with subprocess.Popen(follow, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        wait_until(lambda: client.get_health()["healthy"])
        bead = client.beads.create(id="bd-x1", title="t", project_id="p")
        assert json.loads(process.stdout.readline())["entity_id"] == bead["id"]
        process.terminate()
    words = {"_LOOM_COMPLETE": "bash_complete", "COMP_WORDS": "loom bead show bd-", "COMP_CWORD": "3"}
    code = "from loom.cli import main; main(prog_name='loom')"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**env, **words}, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["plain,bd-x1"]
