"""Clients of a cluster, for the tests of `loom.client`."""

from __future__ import annotations

from typing import Any

from harness.cluster import Cluster
from loom.client import Client


def client_of(cluster: Cluster, first: int = 0, **options: Any) -> Client:
    """A client that knows all instances, and asks this one first."""
    urls = [f"http://127.0.0.1:{port}" for port in cluster.ports]
    return Client(urls[first:] + urls[:first], **options)


def team_of(client: Client, *agents: str) -> None:
    """A project `p` with these agents."""
    client.projects.ensure("p", name="p", git_repo="r", branch="main")
    for agent in agents:
        client.agents.ensure(agent, persona_name="worker", project_id="p")
