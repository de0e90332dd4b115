"""An instance needs a bounded amount of memory, whatever is asked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import Client, Cluster
from harness.locks import Sql
from harness.work import BEADS, PROJECT, team

from loom.bounds import bounds

MOST = 256  # MiB
MIB = 1024 * 1024


def peak(pid: int) -> int:
    """The most memory that a process has had resident, in MiB."""
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def fill(sql: Sql) -> None:
    """Beads, events, comments and grants, each as large as it may be; small values take the most memory in Python."""
    contents = [
        "('{\"k\": [' || repeat('[],', 260000) || '[]]}')::jsonb",
        "jsonb_build_object('k', repeat('x', 1000000) || chr(128512))",
        "jsonb_build_object('k', repeat(chr(128512), 255000))",
    ]
    for n in range(60):
        values = f"('b{n:03}', 't', '{PROJECT}', {contents[n % 3]})"
        sql(f"INSERT INTO beads (id, title, project_id, context) VALUES {values}")
    sql(
        "INSERT INTO comments (entity_type, entity_id, project_id, content)"
        f" SELECT 'bead', 'b000', '{PROJECT}', repeat('x', 1000000) || chr(128512) FROM generate_series(1, 12)"
    )
    sql(
        "SELECT acquire_lock('l' || n, 'me', NULL, INTERVAL '1 hour', jsonb_build_object('k', repeat('x', 8000)),"
        "                    false) FROM generate_series(1, 2500) AS n"
    )


def test_an_instance_stays_within_its_memory_whatever_is_asked(start_cluster: Callable[..., Cluster], sql: Sql) -> None:
    cluster = start_cluster(1)
    team(cluster.client())
    fill(sql)
    asked: list[tuple[str, str, bytes | None]] = [
        ("GET", BEADS, None),
        ("GET", f"{BEADS}/b000/comments", None),
        ("GET", "/api/v1/events?after=0&limit=1000", None),
        ("GET", "/api/v1/grants", None),
        ("GET", "/api/v1/work-graph", None),
        ("PATCH", f"{BEADS}/b001", b'{"attributes": {"a": [' + b"[]," * (bounds.values - 10) + b"1]}}"),
        ("PATCH", f"{BEADS}/b002", b'{"description": "' + b"x" * (MIB - 30) + b'"}'),
        ("PATCH", f"{BEADS}/b003", json.dumps({"attributes": {f"{n}": n for n in range(50_000)}}).encode()),
        ("POST", "/api/v1/config/import.yaml", b"a: [" + b"1," * (bounds.values - 10) + b"]" + b"#" * 4 * MIB),
    ]

    def ask(request: tuple[str, str, Any]) -> int:
        with contextlib.closing(Client(cluster.ports[0])) as client:
            answer = client.request(*request)
            assert len(answer.body) < bounds.page_bytes + 3 * MIB
            return answer.status

    peaks = {"at the start": peak(cluster.pid(0))}
    with ThreadPoolExecutor(10) as threads:
        for request in asked:
            assert set(threads.map(ask, [request] * 10)) <= {200, 400, 413, 503}
            peaks[request[1]] = peak(cluster.pid(0))
        assert set(threads.map(ask, asked * 2)) <= {200, 400, 413, 503}
    peaks["at the end"] = peak(cluster.pid(0))
    print(f"MiB: {peaks}")
    assert peaks["at the end"] < MOST, peaks
