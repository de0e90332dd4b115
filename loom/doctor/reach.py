"""Whether the database can be reached, step by step: name, network, login, database, and whether it takes writes."""

from __future__ import annotations

import contextlib
import socket

from loom import embedded
from loom.doctor.look import NO_SESSION, Host, Look, Result, ok, unchecked, wrong
from loom.syslog import look_up_in_process


def host_name(look: Look) -> Result:
    try:
        named = [host for host in look.hosts if not host.is_folder and not host.address]
    except embedded.ServerError as exc:
        look.reachable = False
        return wrong(str(exc), "make run, or loom cluster")
    if not look.hosts:
        return unchecked("database.dsn names no host, so libpq takes its default")
    problems = []
    for host in named:
        address, reason = look_up_in_process(f"{host.name}:{host.port}")
        if address is None:
            problems.append(f"{host.name} does not resolve: {reason}")
    if not problems:
        return ok(", ".join(map(str, look.hosts)))
    look.reachable = len(problems) < len(look.hosts)
    return wrong("; ".join(problems), f"getent hosts {named[0].name}; correct the host in database.dsn, or the DNS")


def network(look: Look) -> Result:
    if not look.reachable:
        return unchecked("no host of database.dsn resolves")
    if not look.hosts:
        return unchecked("database.dsn names no host, so libpq takes its default")
    problems = {host: problem for host in look.hosts if (problem := _refusal(look, host))}
    if not problems:
        return ok("all servers answer" if len(look.hosts) > 1 else "the server answers")
    look.reachable = len(problems) < len(look.hosts)
    host = next(iter(problems))
    test = "systemctl status postgresql" if host.is_folder else f"nc -zv {host.name} {host.port}"
    also = "; on its host: systemctl status postgresql, listen_addresses, firewall" if not host.is_folder else ""
    return wrong("; ".join(problems.values()), f"{test}{also}")


def _refusal(look: Look, host: Host) -> str:
    """Why the server takes no connection, or an empty text."""
    try:
        if host.is_folder:
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
                probe.settimeout(look.timeout)
                probe.connect(f"{host.name}/.s.PGSQL.{host.port}")
        else:
            address = (host.address or host.name, host.port)
            socket.create_connection(address, look.timeout / len(look.hosts)).close()
    except (ConnectionRefusedError, FileNotFoundError):
        return f"no server listens on {host}"
    except socket.gaierror:
        return ""  # host_name() has told
    except TimeoutError:
        return f"{host} does not answer within {look.timeout / len(look.hosts):.1f} s: a firewall, or a frozen host"
    except OSError as exc:
        return f"{host} cannot be reached: {exc.strerror}"
    return ""


def login(look: Look) -> Result:
    if look.connection is None and not _session_was_refused_by(look, "database", "primary"):
        return unchecked(NO_SESSION)
    return ok(f"the server accepts {look.parameters.get('user') or 'the default role'}")


def database(look: Look) -> Result:
    if look.connection is None:
        return ok("it exists") if _session_was_refused_by(look, "primary") else unchecked(NO_SESSION)
    info = look.connection.raw.info
    encoding = info.parameter_status("server_encoding")
    if encoding not in (None, "UTF8"):
        remedy = f"CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0, and move the data of {info.dbname} there"
        return wrong(f"{info.dbname} has the encoding {encoding}, Loom needs UTF8", remedy)
    return ok(f"{info.dbname} exists, in UTF8")


def primary(look: Look) -> Result:
    return ok("the server takes writes")  # else there would be no session


def _session_was_refused_by(look: Look, *checks: str) -> bool:
    return look.trouble is not None and look.trouble[0] in checks
