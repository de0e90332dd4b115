"""What the tests share: real servers in processes of their own, and clients. `from harness import Cluster`."""

from __future__ import annotations

from harness.client import Answer, AppClient, Client, Patient
from harness.cluster import Cluster
from harness.pgbouncer import PgBouncer
from harness.postgres import Postgres
from harness.processes import MARGIN, Process, free_port, program, version, wait_until

__all__ = [
    "MARGIN",
    "Answer",
    "AppClient",
    "Client",
    "Cluster",
    "Patient",
    "PgBouncer",
    "Postgres",
    "Process",
    "free_port",
    "program",
    "version",
    "wait_until",
]
