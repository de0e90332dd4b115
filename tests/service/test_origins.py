"""No web page that somebody opens can read or change anything through the browser, unless its origin is allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flask import Flask
from harness import AppClient
from harness.locks import assert_problem

from loom.config import Config, SecurityConfig, ServerConfig

KEY = "/api/v1/config/team.policy"
EVIL, UI = "https://evil.example", "https://ui.example.com"
WRITES = [("PUT", KEY), ("DELETE", KEY), ("POST", "/api/v1/locks/build"), ("PATCH", "/api/v1/beads/b")]


@pytest.fixture
def config(config: Config) -> Config:
    return replace(
        config,
        server=ServerConfig(threads=32, allowed_hosts=("loom.example.com",)),
        security=SecurityConfig(allowed_origins=(UI,)),
    )


@pytest.mark.parametrize(("method", "path"), WRITES)
@pytest.mark.parametrize(
    "sent",
    [
        {"Origin": EVIL, "Host": "localhost:8080"},
        {"Origin": "null", "Host": "localhost:8080"},
        {"Origin": "http://localhost:9999", "Host": "localhost:8080"},
        {"Origin": "http://localhost:8080.evil.example", "Host": "localhost:8080"},
        {"Origin": "http://localhost:8080", "Host": "localhost:8080", "Sec-Fetch-Site": "cross-site"},
        {"Host": "localhost:8080", "Sec-Fetch-Site": "same-site"},
        {"Origin": EVIL},  # without a Host, as HTTP/1.0 allows it
    ],
)
def test_a_page_of_another_origin_cannot_write(client: AppClient, method: str, path: str, sent: dict[str, str]) -> None:
    answer = client.request(method, path, {"value": 1}, headers={**sent, "Content-Type": "text/plain"})
    assert_problem(answer, 403, "forbidden")
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize(
    "sent",
    [
        {},  # curl
        {"Host": "loom.example.com"},
        {"Origin": "https://loom.example.com", "Host": "loom.example.com", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://LOCALHOST:8080", "Host": "localhost:8080"},
        {"Origin": "http://[::1]:8080", "Host": "[::1]:8080", "Sec-Fetch-Site": "same-origin"},
        {"Host": "127.0.0.1:8080", "Sec-Fetch-Site": "none"},
        {"Origin": UI, "Host": "localhost:8080", "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_our_own_pages_allowed_ones_and_programs_can_write(client: AppClient, sent: dict[str, str]) -> None:
    assert client.put(KEY, {"value": 1}, headers=sent).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.", "", "[x]"]
)
def test_a_name_that_is_not_ours_reads_nothing(client: AppClient, host: str) -> None:
    for path in ("/api/v1/locks", "/api/v1/config", "/metrics", "/api/openapi.yaml", "/api/v1/nothing"):
        assert_problem(client.get(path, headers={"Host": host}), 421, "misdirected")
    for path in ("/health", "/health/live", "/health/ready", "/api/v1/health"):
        assert client.get(path, headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8080", "127.0.0.1:8000", "10.1.2.3", "[::1]:8080", "::1", "Loom.example.com:8000"]
)
def test_addresses_localhost_and_listed_names_are_served(client: AppClient, host: str) -> None:
    assert client.get("/api/v1/locks", headers={"Host": host}).status == 200


def test_only_allowed_origins_may_read_answers(client: AppClient) -> None:
    for origin in (EVIL, None, UI + ":444", UI.replace("https", "http")):
        answer = client.get("/api/v1/locks", headers={"Origin": origin} if origin else {})
        assert (answer.status, answer.headers["Vary"]) == (200, "Origin")
        assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]
    for path, status in (("/api/v1/locks", 200), ("/api/v1/locks/free", 404)):
        answer = client.get(path, headers={"Origin": UI})
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, UI)
        assert "ETag" in answer.headers["Access-Control-Expose-Headers"]
        assert "Access-Control-Allow-Credentials" not in answer.headers


def test_a_browser_that_asks_first_is_told_what_an_allowed_origin_may_send(client: AppClient) -> None:
    asks = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "x-api-key"}
    answer = client.request("OPTIONS", KEY, headers={"Origin": UI, **asks})
    assert answer.status == 200
    assert "PUT" in answer.headers["Access-Control-Allow-Methods"]
    assert "X-API-Key" in answer.headers["Access-Control-Allow-Headers"]
    answer = client.request("OPTIONS", KEY, headers={"Origin": EVIL, **asks})
    assert "Access-Control-Allow-Methods" not in answer.headers


def test_without_allowed_origins_no_answer_differs(app: Flask, client: AppClient, config: Config) -> None:
    app.config["LOOM"] = replace(config, security=SecurityConfig())
    assert "Vary" not in client.get("/api/v1/locks", headers={"Origin": UI}).headers
    assert_problem(client.put(KEY, {"value": 1}, headers={"Origin": UI}), 403, "forbidden")
