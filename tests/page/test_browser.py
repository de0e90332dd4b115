"""The browser that the other tests here use is real: it loads what an instance serves, and reports what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import Cluster


def test_a_browser_shows_an_answer_and_reports_an_error(
    start_cluster: Callable[..., Cluster], open_page: Callable[..., Any]
) -> None:
    cluster = start_cluster(1)
    page = open_page(f"http://127.0.0.1:{cluster.ports[0]}/health")
    assert '"healthy":true' in page.content()
    with page.expect_event("pageerror"):
        page.evaluate("setTimeout(() => { throw new Error('planted') })")
    assert "planted" in page.reports
