"""`loom mcp`, with the client of the official SDK over standard input and output."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from harness import MARGIN, Cluster, wait_until
from harness.loom_client import client_of, team_of

mcp = pytest.importorskip("mcp")


def server(cluster: Cluster, agent: str = "ann") -> Any:
    url = f"http://127.0.0.1:{cluster.ports[0]}"
    arguments = ["-m", "loom", "mcp", "--agent", agent, "--project", "p", "--server", url]
    return mcp.StdioServerParameters(command=sys.executable, args=arguments)


def text(result: Any) -> str:
    return " ".join(part.text for part in result.content)


async def ok(client: Any, name: str, **arguments: Any) -> Any:
    result = await client.call_tool(name, arguments)
    assert not result.is_error, text(result)
    return json.loads(text(result))


async def refused(client: Any, name: str, **arguments: Any) -> str:
    result = await client.call_tool(name, arguments)
    assert result.is_error
    return text(result)


def test_a_coding_agent_works_with_the_tools(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    loom = client_of(cluster)
    team_of(loom, "bob")

    async def work() -> None:
        async with mcp.Client(server(cluster)) as client:
            tools = (await client.list_tools()).tools
            assert len(tools) <= 8
            assert all(tool.description and len(tool.description) < 300 for tool in tools)
            assert (await ok(client, "claim_work")) == {"claimed": False, "reason": "nothing is ready"}
            made = await ok(
                client, "add_beads", beads=[{"title": "A", "ref": "a"}, {"title": "B", "blocked_by": ["a"]}]
            )
            one, two = (bead["id"] for bead in made["beads"])
            assert "Correct the argument" in await refused(client, "add_beads", beads=[{"title": "C", "priority": 9}])
            assert (await ok(client, "claim_work"))["bead"]["id"] == one
            loom.lock_file("b.py", "p", "bob")
            said = await refused(client, "files", lock=["a.py", "b.py"])
            assert "bob" in said
            assert [file.file_path for file in loom.list_file_locks()] == ["b.py"]  # all or none
            assert (await ok(client, "files", lock=["a.py"], bead_id=one))["locked"] == ["a.py"]
            assert "blocked_by" in await refused(client, "claim_work", bead_id=two)
            held = await ok(client, "heartbeat")
            assert (held["beads"], held["files"]) == ([one], ["a.py"])
            done = await ok(client, "complete_work", bead_id=one, summary="done", context={"x": 1})
            assert done["status"] == "closed"
            assert [file.file_path for file in loom.list_file_locks()] == ["b.py"]
            assert (await ok(client, "claim_work", wait_seconds=5))["bead"]["id"] == two
            await ok(client, "give_back", bead_id=two, reason="too hard", failed=True)
            assert loom.beads.get(two)["failures"] == 1
            assert "Claim other work" in await refused(client, "complete_work", bead_id=two, summary="done")
            await ok(client, "news")
            loom.beads.patch(two, title="B2")
            news = await ok(client, "news", wait_seconds=5)
            assert news["events"][0]["changes"] == {"title": "B2"}
            assert (await ok(client, "show", bead_id=two))["bead"]["title"] == "B2"
            assert [bead["id"] for bead in (await ok(client, "show"))["beads"]] == [two]

    asyncio.run(work())


@pytest.mark.parametrize("call", ["claim_work", "news"])
def test_an_agent_that_ends_in_the_midst_of_a_call_leaves_nothing_claimed_or_locked(
    start_cluster: Callable[..., Cluster], call: str
) -> None:
    cluster = start_cluster(1)
    loom = client_of(cluster)
    team_of(loom)
    bead = loom.beads.create(title="t", project_id="p")["id"]

    async def work() -> None:
        async with mcp.Client(server(cluster)) as client:
            await ok(client, "claim_work")
            await ok(client, "files", lock=["a.py"])
            await ok(client, "news")
            waiting = asyncio.create_task(client.call_tool(call, {"wait_seconds": 100}))
            await asyncio.sleep(0.5)
            waiting.cancel()

    assert loom.beads.get(bead)["status"] == "open"
    asyncio.run(work())
    wait_until(lambda: loom.beads.get(bead)["status"] == "open", 5 + MARGIN)
    wait_until(lambda: not list(loom.list_file_locks()), 5 + MARGIN)
    assert loom.beads.get(bead)["attempts"] == 0


def test_a_lost_claim_is_told_with_the_next_answer(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1)
    loom = client_of(cluster)
    team_of(loom)
    bead = loom.beads.create(title="t", project_id="p")["id"]

    async def work() -> None:
        async with mcp.Client(server(cluster)) as client:
            await ok(client, "claim_work")
            loom.redispatch_bead(bead, reason="test")
            assert "Stop working" in await refused(client, "complete_work", bead_id=bead, summary="done")

    asyncio.run(work())
