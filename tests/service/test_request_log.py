"""An operator sees each request in the log once, and finds by its id all that it has caused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import AppClient

from loom import instances, log
from loom.config import Config, LoggingConfig
from loom.http import request_log
from loom.http.application import Application
from loom.routes import create_app, openapi

LOCKS = "/api/v1/locks/"
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    """The lines of the log so far."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    log.setup(LoggingConfig(output=str(tmp_path / "log")))
    yield lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    root.handlers[:], root.level = handlers, level


def test_each_request_is_one_line_with_what_it_was_and_how_long_it_took(client: AppClient, lines: Lines) -> None:
    client.post(f"{LOCKS}a%20b", {"owner": "me"}, headers={"X-Request-ID": "r-1"})
    (line,) = lines()
    assert 0 < line.pop("database_ms") <= line.pop("duration_ms") < 5000
    assert line.pop("time")
    assert line.pop("pid")
    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "r-1",
        "instance_id": instances.own_id(),
        "port": 8080,
        "method": "POST",
        "route": "/api/v1/locks/{name}",
        "path": "/api/v1/locks/a b",
        "status": 201,
        "caller": "local",
        "lock": "a b",
    }


def test_what_the_path_names_is_a_field(client: AppClient, lines: Lines) -> None:
    paths = {"beads/b-1": "bead", "agents/a-1/heartbeat": "agent", "projects/p-1/state": "project", "locks/x": "lock"}
    for path in paths:
        client.get(f"/api/v1/{path}")
    for line, (path, field) in zip(lines(), paths.items(), strict=True):
        assert line.get(field) == (path.split("/")[1] if line["route"] else None)
    client.get("/nowhere?password=hunter22")
    line = lines()[-1]
    assert (line["route"], line["path"], line["status"]) == (None, "/nowhere", 404)


def test_a_route_in_the_log_is_a_path_of_the_contract(app: Application) -> None:
    known = openapi.document()["paths"].keys()
    routes = {request_log.route(rule.rule).template for rule in app.url_map.iter_rules() if "page" not in rule.endpoint}
    assert routes == set(known)


def test_health_and_the_contract_are_logged_at_debug_only(client: AppClient, lines: Lines) -> None:
    quiet = ["/health", "/health/live", "/health/ready", "/api/openapi.yaml"]
    for path in quiet:
        client.get(path)
    assert lines() == []
    log.set_level("debug")
    for path in quiet:
        client.get(path)
    assert [(line["level"], line["path"]) for line in lines()] == [("debug", path) for path in quiet]


@pytest.mark.parametrize(("requests", "statuses"), [("all", [404, 201]), ("errors", [404]), ("off", [])])
def test_the_setting_chooses_the_requests(
    app: Application, config: Config, lines: Lines, requests: str, statuses: list[int]
) -> None:
    app.config["LOOM"] = Config(config.database, config.server, logging=LoggingConfig(requests=requests))
    client = AppClient(app)
    client.get(f"{LOCKS}x")
    client.post(f"{LOCKS}x", {})
    assert [line["status"] for line in lines()] == statuses


def test_every_answer_has_an_id_that_is_new_if_the_client_gives_none_or_a_bad_one(client: AppClient) -> None:
    for path in ("/health/live", "/nowhere", "/api/v1/locks", "/api/v1/locks?no=1"):
        assert client.get(path, headers={"X-Request-ID": "r-1"}).headers["X-Request-ID"] == "r-1"
        sent: list[dict[str, str]] = [{}, {"X-Request-ID": "a b"}, {}]
        made = {client.get(path, headers=headers).headers["X-Request-ID"] for headers in sent}
        assert len(made) == 3
        assert all(re.fullmatch("[0-9a-f]{32}", each) for each in made)


def test_an_event_and_each_line_carry_the_id_of_the_request_that_caused_them(
    routes: Application, config: Config, instance: instances.Instance, lines: Lines
) -> None:
    app = create_app(config)

    @app.get("/api/v1/broken")
    def broken() -> None:
        raise RuntimeError("broken")

    client = AppClient(app)
    made = client.put("/api/v1/config/k", {"value": 1}).headers["X-Request-ID"]
    assert client.get("/api/v1/events").json["events"][-1]["request_id"] == made
    failed = client.get("/api/v1/broken")
    assert (failed.status, failed.headers["X-Request-ID"]) == (500, lines()[-1]["request_id"])
    caused = [line["event"] for line in lines() if line["request_id"] == failed.headers["X-Request-ID"]]
    assert caused == ["request-failed", "request"]
    log.log.warning("later")
    assert "request_id" not in lines()[-1]


def test_a_request_that_waits_is_one_line_with_the_whole_duration(client: AppClient, lines: Lines) -> None:
    client.post(f"{LOCKS}x", {"owner": "first"})
    answer = client.post(f"{LOCKS}x", {"owner": "second", "wait_seconds": 1})
    assert answer.status == 409
    first, second = lines()
    assert first["duration_ms"] < 1000 <= second["duration_ms"]
    assert second["database_ms"] < 1000
    assert second["request_id"] == answer.headers["X-Request-ID"]


def test_no_secret_of_a_path_or_a_header_is_logged(client: AppClient, lines: Lines) -> None:
    secret = "postgresql://u:hunter22@h/d"
    client.get(f"{LOCKS}{secret}?password=hunter22", headers={"X-Request-ID": secret, "Loom-Actor": "hunter22"})
    client.get(f"{LOCKS}password=hunter22")
    assert [line["status"] for line in lines()] == [400, 404]
    assert "hunter22" not in json.dumps(lines())


def test_a_path_is_cut(client: AppClient, lines: Lines) -> None:
    client.get("/" + "x" * 8000)
    assert len(lines()[0]["path"]) == request_log.MOST_CHARACTERS
