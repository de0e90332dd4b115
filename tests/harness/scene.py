"""A team at work, for the operator's page: something of everything that the page shows."""

from __future__ import annotations

import random
from collections.abc import Sequence

from harness.client import Methods
from harness.locks import Sql, acquire
from harness.work import bead, claim, complete, fail, make

AGENTS = ("coder-1", "coder-2", "coder-3", "reviewer", "tester")
TITLES = (
    "Parse the manifest",
    "Resolve versions",
    "Write the lock file",
    "Download in parallel",
    "Check the signatures",
    "Unpack archives",
    "Report progress",
    "Retry with a delay",
    "Document the cache",
    "Measure cold starts",
)

# Each view of the page, by the name of its screenshot.
VIEWS = {
    "overview": "/",
    "instances": "/instances",
    "locks": "/locks",
    "lock": "/lock?name=deploy/production",
    "beads": "/beads?status=open",
    "ready": "/ready",
    "leases": "/leases",
    "stuck": "/stuck",
    "bead": "/bead?id=shop-sign",
    "agents": "/agents",
    "agent": "/agent?id=coder-1",
    "providers": "/providers",
    "provider": "/provider?id=local",
    "configuration": "/config",
    "setting": "/setting?key=release.channel",
    "events": "/events",
    "search": "/search?q=shop",
    "confirmation": "/actions/unblock-bead?id=shop-sign&version=99",
    "api": "/api",
}


def play(clients: Sequence[Methods], sql: Sql, traffic: bool = True) -> None:
    """Makes the team, its work, locks, and an hour of traffic, through all of these instances in turn."""
    one = clients[0]
    make(one, "/api/v1/projects", id="shop", name="Shop", git_repo="https://example.com/shop.git", branch="main")
    make(
        one,
        "/api/v1/providers",
        id="local",
        name="Local",
        type="openai",
        model="qwen3-coder",
        endpoint="http://gpu:8000/v1",
    )
    make(
        one,
        "/api/v1/providers",
        id="backup",
        name="Backup",
        type="openai",
        model="small",
        endpoint="http://gpu2:8000/v1",
    )
    for agent in AGENTS:
        make(one, "/api/v1/agents", id=agent, name=agent, persona_name="coder", project_id="shop", provider_id="local")
    for n, title in enumerate(TITLES):
        bead(clients[n % len(clients)], f"shop-{n + 1}", title=title, project_id="shop", priority=n % 4)
    bead(one, "shop-sign", title="Sign the release", project_id="shop", priority=0)
    for key, title, blockers in (
        ("shop-publish", "Publish the release", ["shop-sign", "shop-3"]),
        ("shop-announce", "Announce it", ["shop-publish"]),
        ("shop-mirror", "Fill the mirrors", ["shop-publish"]),
        ("shop-retro", "Look back", ["shop-announce", "shop-mirror"]),
    ):
        bead(one, key, title=title, project_id="shop", blocked_by=blockers)
    for key in ("shop-1", "shop-2"):
        complete(one, key, claim(one, key, "reviewer"))
    for _ in range(5):
        fail(one, "shop-sign", claim(one, "shop-sign", "tester"), reason="gpg: no secret key", retry_after_seconds=0)
    for agent, key, lease in (("coder-1", "shop-3", 1500), ("coder-2", "shop-4", 640), ("coder-3", "shop-5", 25)):
        claim(one, key, agent, lease_seconds=lease)
        one.post(f"/api/v1/agents/{agent}/heartbeat", {})
    for n, (name, owner) in enumerate(
        (
            ("deploy/production", "coder-1"),
            ("deploy/staging", "coder-2"),
            ("migrate:shop", "tester"),
            ("cache", "coder-1"),
        )
    ):
        one.post(f"/api/v1/locks/{name}", {"owner": "reviewer", "ttl_seconds": 60})
        grant = one.get(f"/api/v1/locks/{name}").json
        one.delete(f"/api/v1/locks/{name}?fencing_token={grant['fencing_token']}")
        acquire(one, name, owner=owner, ttl_seconds=(540, 95, 3600, 28)[n], metadata={"run": 40 + n})
    one.put("/api/v1/config/release.channel", {"value": "stable"})
    one.put("/api/v1/config/agents.max_concurrent", {"value": 4})
    if traffic:
        _an_hour(sql)


def wait_in_line(client: Methods, name: str, *owners: str) -> None:
    """Takes places in the queue for a lock; they last 2 s."""
    for owner in owners:
        client.post(f"/api/v1/locks/{name}", {"owner": owner, "wait_seconds": 1})


def _an_hour(sql: Sql, seed: int = 7) -> None:
    """What the instances would have recorded."""
    chance = random.Random(seed)
    ids = [row[0] for row in sql("SELECT instance_id::text FROM instances WHERE status = 'active'")]
    rows: list[str] = []
    level = 40.0
    for minute in range(1, 60):
        level = max(8.0, level + chance.uniform(-6, 6.5))
        for place, number in enumerate(ids):
            for kind, part, base in (("request", 0.8, 0.0031), ("acquire", 0.2, 0.009)):
                n = int(60 * level * part / len(ids) * chance.uniform(0.9, 1.1) * (1.2 if place == 0 else 0.9))
                slow = chance.uniform(0.052, 0.07) * (2.5 if kind == "acquire" and 20 < minute < 28 else 1)
                counts = [int(n * (1 - slow)), int(n * slow * 0.8), int(n * slow * 0.15), int(n * slow * 0.05), 0, 0, 0]
                seconds = n * (base + slow * chance.uniform(0.05, 0.1))
                rows.append(
                    f"(date_trunc('minute', clock_timestamp()) - interval '{60 - minute} min', '{number}', '{kind}',"
                    f" {max(1, sum(counts))}, 0, {seconds}, '{{{','.join(map(str, counts))}}}')"
                )
    sql(f"INSERT INTO traffic VALUES {', '.join(rows)} ON CONFLICT DO NOTHING")
