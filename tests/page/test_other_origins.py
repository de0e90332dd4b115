"""A page of another origin, in a real browser: it cannot write, nor read when its name leads to Loom (rebinding)."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from harness import Cluster

KEY = "/api/v1/config/team.policy"
FETCH = """async ([url, options]) => {
    try { const answer = await fetch(url, options); return [answer.status, answer.type]; }
    catch (error) { return [0, "refused by the browser"]; }
}"""


@contextmanager
def served(text: bytes) -> Iterator[int]:
    """The port of a server on which another site's page is."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def test_a_page_of_another_origin_cannot_write(
    start_cluster: Callable[..., Cluster], open_page: Callable[..., Any], dsn: str
) -> None:
    cluster = start_cluster(1)
    client, port = cluster.client(), cluster.ports[0]
    assert client.put(KEY, {"value": "ours"}).status == 200
    target = f"http://localhost:{port}/api/v1/config/import.yaml"
    with served(b"<form method=post enctype=text/plain action='%s'><input name=team.policy: value=1></form>"
                % target.encode()) as theirs:  # fmt: skip
        page = open_page(f"http://127.0.0.1:{theirs}/")
        simple = {
            "method": "POST",
            "mode": "no-cors",
            "headers": {"Content-Type": "text/plain"},
            "body": "team.policy: 1",
        }
        page.evaluate(FETCH, [target, simple])
        with page.expect_navigation() as navigation:
            page.evaluate("document.forms[0].submit()")
        assert navigation.value.status == 403
        assert client.get(KEY).json["value"] == "ours"
        page = open_page(f"http://127.0.0.1:{theirs}/")
        assert page.evaluate(FETCH, [f"http://localhost:{port}{KEY}", {}]) == [0, "refused by the browser"]
    page = open_page(f"http://localhost:{port}/health")
    assert page.evaluate(FETCH, [KEY, {"method": "PUT", "body": '{"value": "mine"}'}])[0] == 200


def test_an_origin_that_is_allowed_can(start_cluster: Callable[..., Cluster], open_page: Callable[..., Any]) -> None:
    with served(b"ours") as ui:
        origin = f"http://127.0.0.1:{ui}"
        cluster = start_cluster(1, config=f"security: {{allowed_origins: ['{origin}']}}")
        page = open_page(f"{origin}/")
        url = f"http://localhost:{cluster.ports[0]}{KEY}"
        assert page.evaluate(FETCH, [url, {"method": "PUT", "body": '{"value": 1}'}]) == [200, "cors"]
        assert page.evaluate(FETCH, [url, {"headers": {"X-API-Key": "of-another"}}]) == [200, "cors"]


def test_a_name_that_leads_to_loom_later_reads_and_writes_nothing(
    start_cluster: Callable[..., Cluster], start_browser: Callable[..., Any]
) -> None:
    """DNS rebinding: to the browser, what the name serves is one origin, wherever the name leads."""
    cluster = start_cluster(1)
    port = cluster.ports[0]
    browser = start_browser("--host-resolver-rules=MAP evil.example 127.0.0.1")
    page = browser.new_page()
    answer = page.goto(f"http://evil.example:{port}/health")
    assert answer.status == 200, "monitors may use any name"
    for path in ("/api/v1/locks", "/api/v1/config", "/metrics"):
        assert page.evaluate(FETCH, [path, {}]) == [421, "basic"]
    assert page.evaluate(FETCH, [KEY, {"method": "PUT", "body": '{"value": 1}'}]) == [421, "basic"]
    assert cluster.client().get(KEY).status == 404
