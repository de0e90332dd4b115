"""What stands around an instance: the settings of its pool, nginx, the syslog server."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import urllib.error
import urllib.request

from loom.doctor.look import Look, Result, ok, unchecked, wrong
from loom.syslog import look_up_in_process

NGINX_SECONDS = 5.0
REFUSAL_SECONDS = 0.3  # within which a host in reach tells that nothing listens on a UDP port


def pool(look: Look) -> Result:
    size, threads = look.config.database.pool_max, look.config.server.threads
    if size > threads and look.config.sources.get("database.pool_max", "default") != "default":
        return wrong(
            f"pool_max_conns is {size}, but only {threads} threads use it",
            f"threads: {size} under `server` in config.yaml, or pool_max_conns={threads} in database.dsn",
        )
    return ok(f"{min(size, threads)} connections for {threads} threads")


def nginx(look: Look) -> Result:
    if look.url is None:
        return unchecked("give its address: loom doctor --url http://localhost:8000")
    url = f"{look.url.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(url, timeout=NGINX_SECONDS) as answer:  # only http and https, see the command
            status, body = answer.status, answer.read(100_000)
    except urllib.error.HTTPError as exc:
        status, body = exc.code, exc.read(100_000)
    except OSError as exc:
        reason = getattr(exc, "reason", exc)
        return wrong(f"{url} does not answer: {reason}", "nginx -t && systemctl status nginx")
    health = None
    with contextlib.suppress(ValueError):
        health = json.loads(body)
    if isinstance(health, dict) and "healthy" in health:
        if health["healthy"]:
            return ok(f"{url} answers, with {health.get('active_instances')} active instances")
        return wrong(f"{url} answers that the instance has no database", "see the checks of the database on its host")
    if status in (502, 503, 504):
        return wrong(
            f"{url} answers {status}: nginx reaches no instance",
            "compare the upstream of nginx with nginx/loom.conf; curl each instance on its port",
        )
    return wrong(f"{url} answers {status}, but not as Loom", "correct --url, or the server block of nginx")


def syslog(look: Look) -> Result:
    settings = look.config.logging.syslog
    if not settings.enabled:
        return unchecked("logging.syslog.enabled is false")
    destination, reason = look_up_in_process(settings.address)
    if destination is None:
        return wrong(f"{settings.address} does not resolve: {reason}", "correct logging.syslog.address, or the DNS")
    family, address = destination
    with socket.socket(family, socket.SOCK_DGRAM) as udp:
        try:
            udp.connect(address)
            udp.send(b"")  # an empty datagram is no line of a log; a closed port is told by ICMP
            if select.select([udp], [], [], REFUSAL_SECONDS)[0]:
                udp.recv(1)
        except OSError as exc:
            return wrong(
                f"{settings.address} takes no lines: {exc.strerror}",
                "on its host: systemctl status rsyslog, and its input imudp",
            )
    return ok(f"{settings.address} resolves, and nothing refuses a datagram; UDP confirms no more")
