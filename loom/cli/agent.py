"""`loom agent`: agents and their heartbeats."""

from __future__ import annotations

import click

from loom.cli import _remote
from loom.cli._remote import Remote, agent_ids, remote, yes_option

agent_id = click.argument("agent", shell_complete=agent_ids)


@click.group()
def agent() -> None:
    """Create, list and remove agents."""


@agent.command()
@click.option("--project")
@click.option("--status", help="One or more, separated by commas.")
@remote
def ls(asked: Remote, project: str | None, status: str | None) -> None:
    """List agents."""
    rows = asked.client.agents.list(project_id=project, status=status)
    asked.print_rows("Agents", rows, ("id", "status", "project_id", ">open_claims", "heartbeat_at"))


@agent.command()
@agent_id
@remote
def show(asked: Remote, agent: str) -> None:
    """Show an agent."""
    asked.print(asked.client.agents.get(agent))


@agent.command()
@click.argument("key", metavar="ID")
@click.option("--project", required=True)
@click.option("--persona", default="worker", show_default=True)
@remote
def add(asked: Remote, key: str, project: str, persona: str) -> None:
    """Create an agent."""
    made = asked.client.agents.create(id=key, persona_name=persona, project_id=project)
    asked.print(made, made["id"])


@agent.command()
@agent_id
@click.option("--claim", "claims", multiple=True, metavar="BEAD=TOKEN", help="A claim to extend.")
@remote
def heartbeat(asked: Remote, agent: str, claims: tuple[str, ...]) -> None:
    """Report that an agent lives. Exit status 4 if one of its claims is lost."""
    try:
        named = {bead: int(token) for bead, _, token in (claim.rpartition("=") for claim in claims)}
    except ValueError:
        raise click.BadParameter("must be BEAD=TOKEN", param_hint="--claim") from None
    result = asked.client.send_heartbeat(agent, claims=named)
    lost = [f"{bead} is lost: {why}" for bead, why in result.lost.items()]
    asked.print(result, "\n".join([*(f"{bead} is extended" for bead in result.extended), *lost]) or "alive")
    if lost:
        raise SystemExit(_remote.CONFLICT)


@agent.command("rm")
@agent_id
@yes_option
@remote
def rm(asked: Remote, agent: str, yes: bool) -> None:
    """Delete an agent; its beads are open again."""
    _remote.confirm(f"Delete agent {agent}?", yes)
    asked.client.agents.delete(agent)
    asked.print({"deleted": agent}, f"agent {agent} is deleted")
