"""What clients send makes neither the metrics nor the memory of an instance grow."""

from __future__ import annotations

from harness import AppClient
from prometheus_client.parser import text_string_to_metric_families

from loom import metrics
from loom.http.application import Application
from loom.http.metrics import REQUESTS
from loom.http.siblings import merged


def test_requests_of_any_kind_are_counted_in_few_series(routes: Application) -> None:
    client, counted, before = AppClient(routes), [], len(REQUESTS.tallies)
    for block in range(3):
        for number in range(200):
            for method in ("GET", "DELETE", f"M{block}-{number}"):
                for path in (
                    f"/{block}-{number}",
                    f"/api/v1/beads/{block}-{number}",
                    f"/api/v1/locks/{block}/{number}",
                ):
                    client.request(method, path)
        counted.append(len(REQUESTS.tallies))
    assert counted[0] == counted[2] < before + 200


def test_an_unknown_outcome_of_a_claim_is_no_new_series() -> None:
    def outcomes() -> int:
        return sum(1 for family in metrics.REGISTRY.collect() if family.name == "loom_claims" for _ in family.samples)

    before = outcomes()
    metrics.count_claim("something new")
    assert outcomes() == before


def test_a_notice_of_another_kind_counts_nothing() -> None:
    def events() -> float:
        families = metrics.REGISTRY.collect()
        return sum(s.value for family in families if family.name == "loom_failover_events" for s in family.samples)

    before = events()
    for notice in ('NOTICE:  relation "x" already exists, skipping\n', "NOTICE:  loom: unknown\n", "loom: \n"):
        metrics.Notices.append(notice)
    assert events() == before
    metrics.Notices.append("NOTICE:  loom: lock_expired\n")
    assert events() == before + 1


def test_the_texts_of_several_workers_become_one_with_each_metric_once() -> None:
    text = (
        '# HELP a_total Of a.\n# TYPE a_total counter\na_total{{w="{0}"}} {0}\n'
        '# HELP b Of b.\n# TYPE b gauge\nb{{w="{0}"}} 9\n'
    )
    families = list(text_string_to_metric_families(merged(map(text.format, (1, 2, 3)))))
    assert [(family.name, family.type, family.documentation) for family in families] == [
        ("a", "counter", "Of a."),
        ("b", "gauge", "Of b."),
    ]
    assert [sample.value for sample in families[0].samples] == [1, 2, 3]
