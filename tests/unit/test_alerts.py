"""The rules for Prometheus: each alert fires when what it is about happens, and an operator finds what to do."""

from __future__ import annotations

from typing import Any

import yaml
from harness.metrics import MONITORING, promtool

from loom.config import resource

RULES = yaml.safe_load((MONITORING / "loom.rules.yml").read_text())["groups"][0]["rules"]
ALERTS = {rule["alert"] for rule in RULES}


def alerts_that_fire(tests: list[dict[str, Any]]) -> set[str]:
    return {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}


def test_each_alert_has_a_test_and_passes_it() -> None:
    tests = MONITORING / "loom.rules.test.yml"
    assert alerts_that_fire(yaml.safe_load(tests.read_text())["tests"]) == ALERTS
    assert promtool("check", "config", MONITORING / "prometheus.yml") == ""
    assert promtool("test", "rules", tests) == ""


def test_the_documentation_says_what_to_do_about_each_alert() -> None:
    lines = resource("docs/monitoring.md").read_text().splitlines()
    assert {line.split("`")[1] for line in lines if line.startswith("| `Loom")} == ALERTS
