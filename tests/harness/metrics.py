"""Reads /metrics as Prometheus does."""

from __future__ import annotations

import shutil
import subprocess

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from harness.client import Methods


def families(client: Methods) -> dict[str, Metric]:
    answer = client.get("/metrics")
    assert answer.status == 200, answer
    return {family.name: family for family in text_string_to_metric_families(answer.body.decode())}


def value(client: Methods, name: str, **labels: str) -> float | None:
    """The sum of the samples of this name that have these labels; None if there is none."""
    found = [
        sample.value
        for family in families(client).values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return sum(found) if found else None


def promtool(*arguments: str, text: bytes = b"") -> str | None:
    """What promtool complains about; None if it is not installed."""
    if shutil.which("promtool") is None:
        return None
    run = subprocess.run(["promtool", *arguments], input=text, capture_output=True, check=False)
    return (run.stdout + run.stderr).decode() if run.returncode else ""
