"""`loom mcp`: Loom's tools for coding agents, by the Model Context Protocol over standard input and output."""

from __future__ import annotations

import functools
import itertools
import logging
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from loom.client import Client, Error, Event, Json, Problem, errors
from loom.client.session import Session

INSTRUCTIONS = """Loom gives you work (beads) and locks, shared with other agents. Claim work, lock the files that you \
edit, complete the bead or give it back. Your claims are kept alive while you think; a lost claim is reported with the \
next answer: then stop working on it."""

T = TypeVar("T", bound=Callable[..., Any])

NEXT = {
    errors.ClaimLost: "Stop working on this bead: another agent may have it. Claim other work.",
    errors.LockHeld: "Another agent edits it. Work on something else, or ask again later.",
    errors.BeadClaimed: "Claim other work.",
    errors.BeadBlocked: "It waits for the beads in blocked_by and children: claim one of these, or other work.",
    errors.BeadClosed: "It is done. Claim other work.",
    errors.AgentBusy: "You hold too many beads: complete one, or give one back.",
    errors.OpenChildren: "Its children are not closed: claim them first. Your claim goes on.",
    errors.Invalid: "Correct the argument that is named, and call again.",
    errors.NotFound: "Check the id with `show`.",
    errors.Unavailable: "Loom is away for a moment: call again in a few seconds.",
    errors.Unreachable: "Loom is away for a moment: call again in a few seconds.",
}


@click.command()
@click.option("--agent", required=True, envvar="LOOM_AGENT", help="The agent's id; by default that of LOOM_AGENT.")
@click.option("--project", envvar="LOOM_PROJECT", help="Its project, where it is created if it does not exist.")
@click.option("--server", envvar="LOOM_SERVER", default="http://localhost:8080", show_default=True)
@click.option("--api-key", envvar="LOOM_API_KEY")
def mcp(agent: str, project: str | None, server: str, api_key: str | None) -> None:
    """Serve Loom's tools to a coding agent, over standard input and output (Model Context Protocol).

    It needs the extra `mcp`. When the agent's session ends, its beads and files are given back.
    """
    try:
        from mcp.server.mcpserver import MCPServer
    except ImportError:
        raise click.ClickException("install the extra: pip install 'loom[mcp]'") from None
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)  # standard output is the protocol's
    client = Client(server, api_key=api_key, actor=agent, timeout=10.0)
    try:
        if project is not None:
            client.agents.ensure(agent, persona_name="coder", project_id=project)
        session = Session(client, agent, project)
    except Error as exc:
        raise click.ClickException(str(exc)) from None
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    server_of_tools = MCPServer("loom", instructions=INSTRUCTIONS, log_level="WARNING")
    _add_tools(server_of_tools, client, session)
    try:
        server_of_tools.run("stdio")
    finally:
        session.close()


def _add_tools(server: Any, client: Client, session: Session) -> None:
    import anyio
    from anyio.to_thread import run_sync
    from mcp.server.mcpserver.exceptions import ToolError

    def tool(function: T) -> T:
        """Registers it; what fails says what to do next, and each answer tells what was lost meanwhile."""

        @functools.wraps(function)
        async def call(**arguments: Any) -> Json:
            try:
                answer: Json = await function(**arguments)
            except Error as exc:
                advice = next((text for kind, text in NEXT.items() if isinstance(exc, kind)), "")
                members = f" {exc.members}" if isinstance(exc, Problem) and exc.members else ""
                raise ToolError(f"{exc}.{members} {advice}") from None
            lost, session.lost = session.lost, {}
            return {**answer, "lost": lost} if lost else answer

        server.tool()(call)
        return function

    async def until(seconds: int, ask: Callable[[int], Any]) -> Any:
        """Ask in short turns: between two of them the end of the session ends the call."""
        ends = time.monotonic() + min(max(seconds, 0), 300)
        while True:
            turn = min(2, max(0, round(ends - time.monotonic())))
            answer = await run_sync(ask, turn)
            if answer or time.monotonic() >= ends:
                return answer
            await anyio.sleep(0.2)

    @tool
    async def claim_work(bead_id: str | None = None, types: list[str] | None = None, wait_seconds: int = 0) -> Json:
        """Get work: the best ready bead, or the one named. `wait_seconds` (up to 300) waits until there is some."""
        cursor = (await run_sync(client.read_events)).next

        def ask(turn: int) -> Any:
            nonlocal cursor
            claim = session.claim(bead_id, types or ())
            if claim is None and turn:
                cursor = client.read_events(cursor, limit=1000, wait_seconds=turn).next
            return claim

        claim = await until(wait_seconds, ask)
        return {"bead": claim.bead, "claimed": True} if claim else {"claimed": False, "reason": "nothing is ready"}

    @tool
    async def heartbeat() -> Json:
        """See what you hold: beads and files. Claims are extended by themselves while your session lasts."""
        return {"agent": session.agent, "beads": list(session.claims), "files": list(session.files)}

    @tool
    async def complete_work(bead_id: str, summary: str, context: dict[str, Any] | None = None) -> Json:
        """Close a bead that you have claimed and finished. `context` is merged into the bead's."""
        bead = await run_sync(
            functools.partial(session.end, bead_id, "complete_bead", close_reason=summary, context=context)
        )
        return {"bead_id": bead_id, "status": bead and bead["status"]}

    @tool
    async def give_back(bead_id: str, reason: str, failed: bool = False) -> Json:
        """Give a bead back that you cannot finish. `failed`: you tried, and it did not work."""
        how = "fail_bead" if failed else "release_claim"
        await run_sync(functools.partial(session.end, bead_id, how, reason=reason))
        return {"bead_id": bead_id, "given_back": True}

    @tool
    async def add_beads(beads: list[dict[str, Any]]) -> Json:
        """Add work, all or none. Each bead: `title`, and if needed `description`, `priority` (0 to 4), `blocked_by`,
        `parent`, `tags`; a `ref` names it for the others of this call."""
        given = [{**({"project_id": session.project} if session.project else {}), **bead} for bead in beads]
        made = await run_sync(client.create_beads, given)
        return {"beads": [{"id": bead["id"], "title": bead["title"]} for bead in made]}

    @tool
    async def show(bead_id: str | None = None) -> Json:
        """Show a bead with its comments; without an id, the beads that are not closed (at most 100)."""

        def look() -> Json:
            if bead_id is not None:
                return {"bead": client.beads.get(bead_id), "comments": list(client.list_bead_comments(bead_id))}
            found = client.beads.list(project_id=session.project, status="open,in_progress,blocked,deferred")
            wanted = ("id", "title", "status", "priority", "assigned_to", "blocked_by")
            rows = [{name: bead[name] for name in wanted if name in bead} for bead in itertools.islice(found, 100)]
            return {"beads": rows}

        return await run_sync(look)

    @tool
    async def files(lock: list[str] | None = None, unlock: list[str] | None = None, bead_id: str | None = None) -> Json:
        """Lock files before you edit them, all or none, and unlock them. With `bead_id`, of a bead that you have
        claimed, they are unlocked when that claim ends."""
        await run_sync(session.unlock_files, unlock or [])
        await run_sync(session.lock_files, lock or [], bead_id)
        return {"locked": list(session.files)}

    latest: list[int] = []

    @tool
    async def news(wait_seconds: int = 0) -> Json:
        """What other agents have changed since you last asked. `wait_seconds` (up to 300) waits for the next change."""

        def ask(turn: int) -> list[Event]:
            page = client.read_events(
                latest[0] if latest else None, limit=50, wait_seconds=turn if latest else 0, project_id=session.project
            )
            latest[:] = [page.next]
            return [event for event in page.events if event.actor != session.agent]

        found = await until(wait_seconds, ask)
        return {"events": [{"type": e.type, "id": e.entity_id, "by": e.actor, "changes": e.changes} for e in found]}
