"""What each route is for: one table. A rule that is not in it keeps the application from starting.

open    everybody, without a key
reader  who has a key of any role
agent   roles agent and admin; an agent only for itself, or for agents that its principal has registered
admin   the role admin
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

RANKS = ("open", "reader", "agent", "admin")
OPEN, READER, AGENT, ADMIN = range(4)

TABLE = {
    "/health": "GET open",
    "/health/live": "GET open",
    "/health/ready": "GET open",
    "/api/v1/health": "GET open",
    "/api/openapi.yaml": "GET open",
    "/metrics": "GET reader",
    "/api/v1/instances": "GET reader",
    "/api/v1/instances/<instance_id>": "GET reader",
    # A release by force needs admin.
    "/api/v1/locks": "GET reader",
    "/api/v1/locks/<name:_>": "GET reader, POST PUT DELETE agent",
    "/api/v1/grants": "GET reader",
    "/api/v1/file-locks": "GET reader, POST agent",
    "/api/v1/file-locks/<name:_>": "DELETE agent",
    "/api/v1/projects": "GET reader, POST admin",
    "/api/v1/projects/<key>": "GET reader, PUT PATCH DELETE admin",
    "/api/v1/projects/<key>/history": "GET reader",
    "/api/v1/projects/<key>/state": "GET reader",
    "/api/v1/projects/<key>/comments": "GET reader, POST agent",
    "/api/v1/projects/<key>/agents": "POST admin",
    "/api/v1/projects/<key>/close": "POST admin",
    "/api/v1/projects/<key>/reopen": "POST admin",
    "/api/v1/providers": "GET reader, POST admin",
    "/api/v1/providers/<key>": "GET reader, PUT PATCH DELETE admin",
    "/api/v1/providers/<key>/history": "GET reader",
    "/api/v1/providers/<key>/models": "GET reader",
    "/api/v1/agents": "GET reader, POST agent",
    "/api/v1/agents/<key>": "GET reader, PUT PATCH agent, DELETE admin",
    "/api/v1/agents/<key>/history": "GET reader",
    "/api/v1/agents/<key>/heartbeat": "POST agent",
    "/api/v1/beads": "GET reader, POST agent",
    "/api/v1/beads/bulk": "POST agent",
    "/api/v1/beads/<key>": "GET reader, PUT PATCH agent, DELETE admin",
    "/api/v1/beads/<key>/history": "GET reader",
    "/api/v1/beads/<key>/comments": "GET reader, POST agent",
    "/api/v1/beads/claim": "POST agent",
    "/api/v1/beads/<key>/claim": "POST PUT DELETE agent",
    "/api/v1/beads/<key>/complete": "POST agent",
    "/api/v1/beads/<key>/fail": "POST agent",
    "/api/v1/beads/<key>/redispatch": "POST admin",
    "/api/v1/work-graph": "GET reader",
    "/api/v1/events": "GET reader",
    "/api/v1/logs": "GET reader, POST agent",
    "/api/v1/logs/recent": "GET reader",
    "/api/v1/analytics/logs": "GET reader",
    "/api/v1/analytics/stats": "GET reader",
    "/api/v1/analytics/costs": "GET reader",
    "/api/v1/analytics/export": "GET reader",
    # Readers do not see hosts and paths of the settings; to change a setting needs admin.
    "/api/v1/config": "GET reader, PUT admin",
    "/api/v1/config/<key>": "GET reader, PUT agent, DELETE admin",
    "/api/v1/config/<key>/history": "GET reader",
    "/api/v1/config/export.yaml": "GET reader",
    "/api/v1/config/import.yaml": "POST admin",
    # The page; actions have a page of their own, on which they are asked for again.
    "/": "GET reader",
    "/agent": "GET reader",
    "/agents": "GET reader",
    "/bead": "GET reader",
    "/beads": "GET reader",
    "/config": "GET reader",
    "/events": "GET reader",
    "/instance": "GET reader",
    "/instances": "GET reader",
    "/leases": "GET reader",
    "/lock": "GET reader",
    "/locks": "GET reader",
    "/provider": "GET reader",
    "/providers": "GET reader",
    "/ready": "GET reader",
    "/search": "GET reader",
    "/setting": "GET reader",
    "/stuck": "GET reader",
    "/actions/<action>": "GET POST admin",
    "/api": "GET open",
    "/favicon.ico": "GET open",
    "/static/<digest>/<name>": "GET open",
    "/api/v1/keys": "GET POST admin",
    "/api/v1/keys/<key_id>": "GET DELETE admin",
    "/api/v1/keys/<key_id>/rotate": "POST admin",
}


def _ranks(text: str) -> dict[str, int]:
    """The rank that each method needs, from such a text as "GET reader, POST PUT agent"."""
    found: dict[str, int] = {}
    for part in text.split(", "):
        *methods, role = part.split()
        found |= dict.fromkeys(methods, RANKS.index(role))
    if "GET" in found:
        found["HEAD"] = found["GET"]
    return found


_NEEDED = {rule: _ranks(text) for rule, text in TABLE.items()}


def check(rules: Iterable[Any]) -> None:
    """Raises RuntimeError unless the table has exactly the application's rules and methods."""
    served: dict[str, set[str]] = {}
    for rule in rules:
        served.setdefault(rule.rule, set()).update(rule.methods - {"HEAD", "OPTIONS"})
    listed = {rule: needed.keys() - {"HEAD"} for rule, needed in _NEEDED.items()}
    for rule in served.keys() | listed.keys():
        if served.get(rule) != listed.get(rule):
            methods = ", ".join(sorted(served.get(rule, ()))) or "nothing"
            raise RuntimeError(f"loom/http/permissions.py must say who may do what at {rule}, which serves {methods}.")


def needed(rule: str | None, method: str) -> int:
    """The least rank for a method of a rule; for a path that no rule serves, that of whoever may know this."""
    if method == "OPTIONS":
        return OPEN
    if rule is None:
        return READER
    return _NEEDED.get(rule, {}).get(method, ADMIN)
