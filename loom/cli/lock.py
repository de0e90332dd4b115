"""`loom lock`: hold a lock while a command runs; see and end grants."""

from __future__ import annotations

import sys

import click

from loom.cli import _remote
from loom.cli._remote import Remote, lock_names, remote, yes_option


@click.group()
def lock() -> None:
    """Hold a lock while a command runs; see and end grants."""


@lock.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name", shell_complete=lock_names)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--ttl", type=click.IntRange(1, 86400), default=30, show_default=True, help="Seconds; it is renewed.")
@click.option("--wait", type=click.FloatRange(0), default=0.0, show_default=True, help="Seconds to wait for the lock.")
@remote
def run(asked: Remote, name: str, command: tuple[str, ...], ttl: int, wait: float) -> None:
    """Run COMMAND while the lock NAME is held: loom lock run deploy -- ./deploy.sh

    Its options come before NAME. The command gets LOOM_FENCING_TOKEN and LOOM_LOCK_NAME, and a process group of its
    own, to which signals are passed on. If the lock is lost, the group gets SIGTERM, and SIGKILL a third of the TTL
    later. The exit status is the command's; 75 if the lock was not acquired, 70 if it was lost.
    """
    from loom.cli import _lock_run

    command = command[1:] if command[0] == "--" else command
    if not command:
        raise click.UsageError("COMMAND is missing")
    sys.exit(_lock_run.run(asked.client.lock(name, ttl, metadata={"command": command[0][:200]}), wait, ttl, command))


@lock.command("ls")
@click.option("--prefix", help="The start of their names.")
@click.option("--owner")
@remote
def ls(asked: Remote, prefix: str | None, owner: str | None) -> None:
    """List the locks that are held."""
    rows = asked.client.list_locks(prefix=prefix, owner=owner)
    asked.print_rows("Locks", rows, ("lock_name", "owner", ">fencing_token", "acquired_at", "expires_at"))


@lock.command()
@click.argument("name", shell_complete=lock_names)
@remote
def show(asked: Remote, name: str) -> None:
    """Show who holds a lock, and how many wait. Exit status 3 if it is free."""
    held = asked.client.get_lock(name)
    if held is None:
        click.echo(f"lock {name} is free", err=True)
        sys.exit(_remote.NOT_FOUND)
    asked.print(held)


@lock.command()
@click.argument("name", shell_complete=lock_names)
@click.argument("fencing_token", type=int)
@remote
def release(asked: Remote, name: str, fencing_token: int) -> None:
    """Release the grant with this token. Exit status 4 if it ended in another way."""
    asked.client.release_lock(name, fencing_token)
    asked.print({"released": name, "fencing_token": fencing_token}, f"lock {name} is released")


@lock.command("force-release")
@click.argument("name", shell_complete=lock_names)
@click.option("--token", type=int, help="The grant that is meant; by default the one that is held now.")
@click.option("--reason", required=True, help="Kept in the history.")
@yes_option
@remote
def force_release(asked: Remote, name: str, token: int | None, reason: str, yes: bool) -> None:
    """End somebody else's grant. Its holder may still be at work: only its fencing token stops its writes."""
    held = asked.client.get_lock(name)
    if held is None and token is None:
        click.echo(f"lock {name} is free", err=True)
        sys.exit(_remote.NOT_FOUND)
    meant = token if token is not None or held is None else held.fencing_token
    assert meant is not None
    _remote.confirm(f"End grant {meant} of lock {name}, held by {held.owner if held else 'nobody'}?", yes)
    asked.client.release_lock(name, meant, force=True, reason=reason)
    asked.print({"released": name, "fencing_token": meant}, f"grant {meant} of lock {name} is ended")
