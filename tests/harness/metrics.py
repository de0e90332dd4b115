"""Reads /metrics as Prometheus does."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from harness.client import Client, Methods
from harness.processes import Process, free_port, program
from loom.config import resource

MONITORING = resource("deploy/monitoring")


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


def promtool(*arguments: str | Path, text: bytes = b"") -> str:
    """What promtool complains about; empty if it finds no fault. Skips the test if it is not installed."""
    command = [program("promtool", "prometheus"), *map(str, arguments)]
    run = subprocess.run(command, input=text, capture_output=True, check=False)
    return (run.stdout + run.stderr).decode() if run.returncode else ""


class Prometheus:
    """Prometheus with the project's configuration, on these ports; it scrapes each second, and alerts soon."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        rules = (MONITORING / "loom.rules.yml").read_text()
        (folder / "loom.rules.yml").write_text(re.sub("for: .*", "for: 2s", rules))
        self.port = free_port()
        options = {
            "config.file": folder / "prometheus.yml",
            "storage.tsdb.path": folder / "data",
            "web.listen-address": f"127.0.0.1:{self.port}",
        }
        command = [program("prometheus", "prometheus"), *(f"--{name}={value}" for name, value in options.items())]
        self.process = Process(command, folder / "prometheus.log")

    def firing(self) -> set[str]:
        """The names of the alerts that fire now; none before it answers."""
        alerts = self._data("/api/v1/alerts").get("alerts", [])
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def query(self, text: str) -> list[float]:
        """The values of a query, at most a few seconds old; none before it answers."""
        found = self._data(f"/api/v1/query?query={quote(text)}").get("result", [])
        return [float(series["value"][1]) for series in found]

    def _data(self, path: str) -> dict[str, Any]:
        with contextlib.suppress(OSError), contextlib.closing(Client(self.port, 5)) as client:
            answer = client.get(path)
            if answer.status != 503:  # it is starting
                return answer.json["data"]
        return {}

    def close(self) -> None:
        self.process.stop(signal.SIGKILL, 10)
        print(f"--- prometheus\n{self.process.last_lines()}")
