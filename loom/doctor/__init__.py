"""What can be wrong with a deployment. Each check is one function that reads, in one table; `loom doctor` runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import psycopg2
from psycopg2 import errors as pg

from loom.config import Config
from loom.doctor import outside, reach, server, state
from loom.doctor.look import NO_SESSION, Limits, Look, Result, unchecked, wrong
from loom.dsn import connect_problem

__all__ = ["CHECKS", "Finding", "Limits", "Result", "examine"]


class Check(NamedTuple):
    """`needs_session`: with the database."""

    name: str
    run: Callable[[Look], Result]
    needs_session: bool = True


# In the order in which the causes come before their effects.
CHECKS = (
    Check("host name", reach.host_name, False),
    Check("network", reach.network, False),
    Check("login", reach.login, False),
    Check("database", reach.database, False),
    Check("primary", reach.primary),
    Check("server version", server.version),
    Check("TLS", server.tls),
    Check("clock", server.clock),
    Check("connections", server.connections),
    Check("pool", outside.pool, False),
    Check("schema", state.schema_version),
    Check("rights", state.rights),
    Check("durability", server.durability),
    Check("replication", server.replication),
    Check("snapshots", server.snapshots),
    Check("row locks", server.row_locks),
    Check("vacuum", state.vacuum),
    Check("instances", state.registry),
    Check("clean-up", state.clean_up),
    Check("locks", state.locks),
    Check("split brain", state.split_brain),
    Check("nginx", outside.nginx, False),
    Check("syslog", outside.syslog, False),
)


@dataclass(frozen=True)
class Finding(Result):
    """The result of the check of this name."""

    check: str = ""


LIMITS = Limits()


def examine(config: Config, url: str | None = None, limits: Limits = LIMITS) -> list[Finding]:
    """Runs every check, each within a bound. `url`: the address of nginx, or what else stands before the instances."""
    look = Look(config, url, limits)
    try:
        results = [(check.name, _run(check, look)) for check in CHECKS]
    finally:
        look.close()
    return [Finding(result.state, result.text, result.remedy, name) for name, result in results]


def _run(check: Check, look: Look) -> Result:
    if check.run not in (reach.host_name, reach.network):
        _ = look.connection  # else nobody knows the trouble
        if look.trouble is not None and look.trouble[0] == check.name:
            return look.trouble[1]
        if check.needs_session and look.connection is None:
            return unchecked(NO_SESSION)
    try:
        return check.run(look)
    except pg.InsufficientPrivilege as exc:
        return unchecked(f"the role has not the right: {str(exc).splitlines()[0]}")
    except (pg.UndefinedTable, pg.UndefinedColumn, pg.UndefinedFunction, pg.UndefinedObject) as exc:
        return unchecked(f"the schema does not fit: {str(exc).splitlines()[0]}")
    except pg.LockNotAvailable:
        return unchecked("a table that it reads is locked; see row locks")
    except pg.QueryCanceled:
        return unchecked(f"it took longer than {look.timeout:.0f} s")
    except psycopg2.Error as exc:
        return wrong(f"the database did not answer: {connect_problem(str(exc))}", "look into the log of PostgreSQL")
