"""`loom bead`: beads, as an agent or a person works with them."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from typing import Any

import click

from loom.cli import _remote
from loom.cli._remote import Remote, agent_ids, bead_ids, remote
from loom.client.values import Json

COLUMNS = ("id", "status", ">priority", "title", "assigned_to", "blocked_by")
bead_id = click.argument("bead", shell_complete=bead_ids)
token = click.option("--token", type=int, help="The claim's; by default the one that the bead has now.")


@click.group()
def bead() -> None:
    """Create, list, claim and complete beads."""


@bead.command()
@click.argument("title")
@click.option("--project", required=True)
@click.option("--id", "key")
@click.option("--description")
@click.option("--type", "kind")
@click.option("--priority", type=click.IntRange(0, 4))
@click.option("--parent", shell_complete=bead_ids)
@click.option("--blocked-by", multiple=True, shell_complete=bead_ids)
@click.option("--tag", "tags", multiple=True)
@remote
def add(asked: Remote, title: str, project: str, key: str | None, kind: str | None, **fields: Any) -> None:
    """Create a bead."""
    given: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items() if value
    }
    if fields["priority"] is not None:
        given["priority"] = fields["priority"]
    given |= {"id": key} if key else {}
    given |= {"type": kind} if kind else {}
    made = asked.client.beads.create(title=title, project_id=project, **given)
    asked.print(made, made["id"])


@bead.command()
@click.option("--project")
@click.option("--status", help="One or more, separated by commas.")
@click.option("--assigned-to", shell_complete=agent_ids)
@click.option("--tag", help="One or more, separated by commas.")
@remote
def ls(asked: Remote, project: str | None, status: str | None, assigned_to: str | None, tag: str | None) -> None:
    """List beads."""
    found = asked.client.beads.list(project_id=project, status=status, assigned_to=assigned_to, tags=tag)
    asked.print_rows("Beads", found, COLUMNS)


@bead.command()
@click.option("--project")
@remote
def ready(asked: Remote, project: str | None) -> None:
    """List the beads that an agent could claim now, in the order in which they are given out."""
    beads = asked.client.get_work_graph(project_id=project)["beads"]
    now = datetime.now(timezone.utc).isoformat()

    def closed(ids: list[str]) -> bool:
        return all((beads.get(id) or asked.client.beads.get(id))["status"] == "closed" for id in ids)

    found = [
        one
        for one in beads.values()
        if one["status"] == "open"
        and (one.get("not_before") or "") <= now
        and closed([*one.get("blocked_by", []), *one.get("children", [])])
    ]
    found.sort(key=lambda one: (one["priority"], one.get("due_date") or "~", one["created_at"]))
    asked.print_rows("Ready", found, COLUMNS)


@bead.command()
@bead_id
@remote
def show(asked: Remote, bead: str) -> None:
    """Show a bead."""
    asked.print(asked.client.beads.get(bead))


@bead.command()
@click.argument("bead", required=False, shell_complete=bead_ids)
@click.option("--agent", required=True, envvar="LOOM_AGENT", shell_complete=agent_ids)
@click.option("--lease", type=click.IntRange(10, 86400), default=1800, show_default=True, help="Seconds.")
@click.option("--project")
@remote
def claim(asked: Remote, bead: str | None, agent: str, lease: int, project: str | None) -> None:
    """Claim this bead, or the best one that is ready. Exit status 5 if none is."""
    if bead is not None:
        claimed = asked.client.claim_bead(bead, agent, lease_seconds=lease)
    else:
        best = asked.client.claim_next_bead(agent, lease_seconds=lease, project_id=project)
        if best is None:
            click.echo("nothing is ready", err=True)
            sys.exit(_remote.NOTHING)
        claimed = best
    text = f"{claimed.bead['id']}  {claimed.bead['title']}\nfencing token {claimed.fencing_token}, lease until "
    asked.print(claimed, text + f"{claimed.lease_expires_at:%Y-%m-%d %H:%M:%S}")


@bead.command()
@bead_id
@token
@click.option("--reason", help="The close reason.")
@remote
def complete(asked: Remote, bead: str, token: int | None, reason: str | None) -> None:
    """Close a bead by its claim."""
    done = asked.client.complete_bead(bead, _token(asked, bead, token), close_reason=reason)
    asked.print(done, f"{bead} is closed")


@bead.command()
@bead_id
@token
@click.option("--reason")
@click.option("--retry-after", type=click.IntRange(0, 86400), help="Seconds until it is ready again.")
@remote
def fail(asked: Remote, bead: str, token: int | None, reason: str | None, retry_after: int | None) -> None:
    """Give a bead back after a failure."""
    held = _token(asked, bead, token)
    failed = asked.client.fail_bead(bead, held, reason=reason, retry_after_seconds=retry_after)
    asked.print(failed, f"{bead} is {failed['status']}, after {failed['failures']} failures")


@bead.command()
@bead_id
@token
@click.option("--reason")
@remote
def release(asked: Remote, bead: str, token: int | None, reason: str | None) -> None:
    """Give a bead back as if it had never been claimed."""
    asked.client.release_claim(bead, _token(asked, bead, token), reason=reason)
    asked.print({"released": bead}, f"{bead} is open")


@bead.command()
@bead_id
@click.argument("blockers", nargs=-1, required=True, shell_complete=bead_ids)
@click.option("--remove", is_flag=True, help="It no longer waits for them.")
@remote
def dep(asked: Remote, bead: str, blockers: tuple[str, ...], remove: bool) -> None:
    """Make BEAD wait for BLOCKERS."""
    before = asked.client.beads.get(bead)
    others = [id for id in before.get("blocked_by", []) if id not in blockers]
    wanted = others if remove else [*others, *blockers]
    changed = asked.client.beads.patch(bead, blocked_by=wanted, if_match=before["version"], merge=True)
    asked.print(changed, f"{bead} waits for {' '.join(changed.get('blocked_by', [])) or 'nothing'}")


@bead.command()
@bead_id
@remote
def tree(asked: Remote, bead: str) -> None:
    """Show what a bead waits for: its children and blockers, and theirs."""
    beads: dict[str, Json] = {}

    def get(id: str) -> Json:
        if id not in beads:
            beads[id] = asked.client.beads.get(id)
        return beads[id]

    def branch(id: str, kind: str, path: tuple[str, ...]) -> Json:
        one = get(id)
        below = [(child, "child") for child in one.get("children", [])] + [
            (other, "blocker") for other in one.get("blocked_by", [])
        ]
        return {
            **{name: one[name] for name in ("id", "title", "status")},
            "kind": kind,
            "waits_for": [branch(other, why, (*path, id)) for other, why in below if other not in path],
        }

    def lines(node: Json, depth: int) -> list[str]:
        kind = f"  ({node['kind']})" if depth else ""
        text = f"{'  ' * depth}{node['id']}  {node['status']}  {node['title']}{kind}"
        return [text, *(line for below in node["waits_for"] for line in lines(below, depth + 1))]

    root = branch(bead, "", ())
    asked.print(root, "\n".join(lines(root, 0)))


@bead.command()
@bead_id
@remote
def history(asked: Remote, bead: str) -> None:
    """List the versions of a bead, newest first."""
    rows = asked.client.beads.history(bead)
    asked.print_rows("History", rows, (">version", "type", "actor", "timestamp", "changes"))


def _token(asked: Remote, bead: str, token: int | None) -> int:
    if token is not None:
        return token
    found = asked.client.beads.get(bead).get("fencing_token")
    if found is None:
        click.echo(f"Error: bead {bead} is not claimed", err=True)
        sys.exit(_remote.CONFLICT)
    return int(found)
