"""`loom keys`: who may use the interface. It works on the database itself, so it needs no key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import get_args

import click
import msgspec

from loom import config, db, errors
from loom.cli._database import dsn_of
from loom.state import keys as state

SECONDS = 10.0  # for each statement


@click.group()
def keys() -> None:
    """Create, list, rotate and revoke API keys."""


@keys.command()
@click.argument("principal")
@click.option("--role", type=click.Choice(get_args(state.Role)), required=True, help="What the key may do.")
@click.option("--days", type=click.IntRange(1, 3660), help="It is valid for so long; without, until it is revoked.")
@click.option("--note", default="", help="For people, such as where the key is kept.")
def create(principal: str, role: state.Role, days: int | None, note: str) -> None:
    """Create a key for PRINCIPAL and print it. It is shown only now."""
    try:
        msgspec.convert(principal, state.Principal)
    except msgspec.ValidationError:
        raise errors.Invalid.field(
            "PRINCIPAL", "must have 1 to 200 characters, without control characters and /"
        ) from None
    lifetime = None if days is None else timedelta(days=days)
    with _database() as conn:
        click.echo(state.create(conn, principal, role, by=None, note=note, lifetime=lifetime).key)


@keys.command(name="list")
def list_() -> None:
    """List all keys, also those that are not valid any longer."""
    with _database() as conn:
        click.echo(f"{'id':16}  {'role':6}  {'state':24}  {'last used':16}  principal")
        for key in state.some(conn, after="", limit=state.MOST):
            validity = f"expires {key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else "valid"
            validity = f"revoked {key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else validity
            used = f"{key.last_used_at:%Y-%m-%d %H:%M}" if key.last_used_at else "never"
            click.echo(f"{key.id:16}  {key.role:6}  {validity:24}  {used:16}  {key.principal}")


@keys.command()
@click.argument("key_id", metavar="ID")
@click.option("--overlap-hours", type=click.IntRange(0, 720), default=24, show_default=True)
def rotate(key_id: str, overlap_hours: int) -> None:
    """Print a new key for the principal of the key ID, which remains valid for some hours."""
    with _database() as conn:
        click.echo(state.rotate(conn, key_id, by=None, overlap=timedelta(hours=overlap_hours)).key)


@keys.command()
@click.argument("key_id", metavar="ID")
def revoke(key_id: str) -> None:
    """End the key ID. Within 6 s, no instance takes it any longer."""
    with _database() as conn:
        state.revoke(conn, key_id, by=None)


@contextlib.contextmanager
def _database() -> Iterator[db.Connection]:
    """A connection in one transaction, to the configured database with this Loom's schema."""
    dsn = dsn_of(config.load().database)
    db.migrate(dsn)
    pool = db.Database(dsn, pool_min=1, pool_max=1, timeout=SECONDS, application_name="loom keys")
    pool.open()
    try:
        with pool.transaction() as conn:
            yield conn
    finally:
        pool.close()
