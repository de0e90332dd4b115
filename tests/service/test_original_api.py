"""Clients of the original Loom, its own page first, go on working: its paths, keys and statuses, none of its losses."""

from __future__ import annotations

from typing import Any

import pytest
from harness import AppClient
from harness.client import Answer
from harness.locks import Sql, instant
from harness.work import AGENTS, BEADS

PROJECTS = "/api/v1/projects"
PROVIDERS = "/api/v1/providers"

# What the original's entities always have; what it leaves out when empty may be absent here too.
KEYS = {
    "agent": "id name persona_name status project_id started_at last_active",
    "bead": "id type title description status priority project_id created_at updated_at",
    "project": "id name git_repo branch beads_path context status is_perpetual is_sticky agents created_at"
    " updated_at git_strategy git_auth_method",
    "provider": "id name type endpoint model configured_model selected_model selection_reason model_score selected_gpu"
    " description requires_key key_id owner_id is_shared status last_heartbeat_at last_heartbeat_latency_ms"
    " last_heartbeat_error cost_per_mtoken context_window supports_function supports_vision supports_streaming tags"
    " metrics created_at updated_at",
}
SPARE = {
    "agent": "role persona provider_id current_bead position_id",
    "bead": "assigned_to blocked_by blocks related_to parent children tags context due_date milestone_id estimated_time"
    " closed_at",
    "project": "bead_prefix parent_id closed_at due_date git_credential_id work_dir last_sync_at last_commit_hash"
    " git_config_options",
    "provider": "gpu_constraints",
}


def ok(answer: Answer, status: int = 200) -> Any:
    assert answer.status == status, answer
    if status == 204:
        assert answer.body == b""
        return None
    assert answer.headers["Content-Type"] == "application/json"
    return answer.json


def refused(answer: Answer, status: int) -> str:
    assert answer.status == status, answer
    return answer.json["error"]


def assert_keys(kind: str, found: dict[str, Any]) -> None:
    assert {*KEYS[kind].split()} <= {*found}
    assert not [name for name in SPARE[kind].split() if name in found and found[name] in (None, "", [], {})]


@pytest.fixture
def page(client: AppClient) -> AppClient:
    """The page, after it made a project, a provider and an agent."""
    ok(
        client.post(
            PROJECTS, {"name": "Web shop", "git_repo": "git@x:y.git", "branch": "main", "beads_path": ".beads"}
        ),
        201,
    )
    ok(client.post(PROVIDERS, {"id": "v", "name": "V", "type": "openai", "endpoint": "http://v", "model": "m"}), 201)
    return client


def test_agents(page: AppClient) -> None:
    assert ok(page.get(AGENTS)) == []
    body = {"name": "Coder (one)", "persona_name": "coder", "project_id": "proj-1", "provider_id": "v", "unknown": 1}
    agent = ok(page.post(AGENTS, body), 201)
    assert_keys("agent", agent)
    assert agent["id"].startswith("agent-")
    assert agent["id"].endswith("-Coder (one)")
    assert agent["id"].split("-")[1].isdigit()
    assert agent["persona_name"] == "default/coder"
    assert agent["status"] in ("paused", "idle")
    path = f"{AGENTS}/{agent['id'].replace(' ', '%20')}"
    assert ok(page.get(path)) == agent
    assert ok(page.get(AGENTS)) == [agent]
    assert ok(page.post(AGENTS, {"persona_name": "org/qa", "project_id": "proj-1"}), 201)["persona_name"] == "org/qa"
    for missing in ("persona_name", "project_id"):
        for value in ({}, {missing: ""}):
            rest = {name: text for name, text in body.items() if name != missing}
            assert missing in refused(page.post(AGENTS, {**rest, **value}), 400)
    persona = {"mission": "m", "character": "c", "tone": "t", "autonomy_level": "full"}
    changed = ok(page.put(path, {"persona": persona}))
    assert changed["persona"] == persona
    assert {name for name in agent if changed[name] != agent[name]} == {"version", "updated_at"}
    assert ok(page.put(path, {"name": "New", "nonsense": True}))["name"] == "New"
    assert refused(page.put(AGENTS + "/nobody", {"name": "x"}), 404) == "Agent not found"
    ok(page.delete(path), 204)
    assert refused(page.delete(path), 404) == refused(page.get(path), 404) == "Agent not found"


def test_projects(page: AppClient, sql: Sql) -> None:
    (project,) = ok(page.get(PROJECTS))
    assert_keys("project", project)
    assert (project["id"], project["status"], project["beads_path"]) == ("proj-1", "open", ".beads")
    assert (project["agents"], project["context"]) == ([], {})
    body = {"name": "n", "git_repo": "r", "branch": "b", "context": {"k": "v"}, "is_sticky": True}
    made = ok(page.post(PROJECTS, body), 201)
    assert {name: made[name] for name in body} == body
    for missing in ("name", "git_repo", "branch"):
        assert missing in refused(page.post(PROJECTS, {**body, missing: ""}), 400)
    path = f"{PROJECTS}/{made['id']}"
    empty = {"name": "", "git_repo": "", "branch": "", "beads_path": "", "status": "", "git_strategy": ""}
    assert ok(page.put(path, {**empty, "is_perpetual": True, "nonsense": 1})) == {
        **made,
        "is_perpetual": True,
        "version": 2,
        "updated_at": ok(page.get(path))["updated_at"],
    }
    changed = ok(page.put(path, {"git_strategy": "branch-pr", "is_perpetual": False, "context": {"z": "1"}}))
    assert (changed["git_strategy"], changed["context"], changed["name"]) == ("branch-pr", {"z": "1"}, "n")

    agent = ok(page.post(AGENTS, {"persona_name": "w", "project_id": "proj-1"}), 201)["id"]
    assert ok(page.post(path + "/agents", {"agent_id": agent}))["agents"] == [agent]
    assert ok(page.get(f"{AGENTS}/{agent}"))["project_id"] == made["id"]
    assert ok(page.get(f"{PROJECTS}/proj-1"))["agents"] == []
    assert ok(page.post(path + "/agents", {"agent_id": agent, "action": "unassign"}))["agents"] == []
    assert_keys("agent", ok(page.get(f"{AGENTS}/{agent}")))
    assert "action" in refused(page.post(path + "/agents", {"agent_id": agent, "action": "fire"}), 400)
    assert "agent_id" in refused(page.post(path + "/agents", {}), 400)
    assert "nobody" in refused(page.post(path + "/agents", {"agent_id": "nobody"}), 400)
    assert refused(page.post(PROJECTS + "/none/agents", {"agent_id": agent}), 404) == "Project not found"

    for body, missing in (({"comment": "c"}, "author_id"), ({"author_id": "a"}, "comment")):
        assert missing in refused(page.post(path + "/comments", body), 400)
    comment = ok(page.post(path + "/comments", {"author_id": "ann", "comment": "c"}), 201)
    assert {"id", "project_id", "author_id", "comment", "timestamp"} <= {*comment}
    assert ok(page.get(path + "/comments")) == [comment]
    assert sql("SELECT DISTINCT actor FROM events WHERE entity_type = 'comment'") == [("ann",)]

    bead = ok(page.post(BEADS, {"title": "t", "project_id": made["id"]}), 201)["id"]
    state = ok(page.get(path + "/state"))
    names = (
        "id name status is_perpetual is_sticky open_beads can_close readiness_ok readiness_issues created_at"
        " updated_at closed_at comments_count"
    )
    assert {*names.split()} <= {*state}
    assert (state["open_beads"], state["can_close"], state["comments_count"]) == (1, False, 1)
    assert "author_id" in refused(page.post(path + "/close", {}), 400)
    refused(page.post(path + "/close", {"author_id": "ann"}), 409)
    ok(page.patch(f"{BEADS}/{bead}", {"status": "closed"}))
    closed = ok(page.post(path + "/close", {"author_id": "ann", "comment": "done"}))
    assert (closed["status"], ok(page.get(path + "/comments"))[-1]["comment"]) == ("closed", "done")
    assert instant(closed["closed_at"])
    again = ok(page.post(path + "/reopen", {"author_id": "bob"}))
    assert (again["status"], "closed_at" in again) == ("reopened", False)
    ok(page.delete(f"{BEADS}/{bead}"), 204)
    ok(page.delete(path), 204)
    for call in (page.get, page.delete):
        assert refused(call(path), 404) == "Project not found"


def test_beads(page: AppClient) -> None:
    new = {"title": "t", "project_id": "proj-1"}
    first = ok(page.post(BEADS, new), 201)
    assert_keys("bead", first)
    assert (first["id"], first["type"], first["priority"], first["status"]) == ("bd-001", "task", 2, "open")
    full = {
        **new,
        "type": "feature",
        "description": "d",
        "priority": 0,
        "parent": "bd-001",
        "tags": ["a"],
        "context": {"k": "v"},
    }
    bead = ok(page.post(BEADS, {**full, "unknown": 1}), 201)
    assert {name: bead[name] for name in full} == full, "the original drops parent, tags and context, and priority 0"
    for missing in ("title", "project_id"):
        assert missing in refused(page.post(BEADS, {name: text for name, text in new.items() if name != missing}), 400)
    assert refused(page.post(BEADS, b"{"), 400) == "Invalid request body"
    assert refused(page.get(BEADS + "/bd-999"), 404) == "Bead not found"
    assert refused(page.patch(BEADS + "/bd-999", {}), 404) == "Bead not found"
    assert refused(page.delete(BEADS), 405)

    path = f"{BEADS}/{bead['id']}"
    changed = ok(page.patch(path, {"context": {"l": "w"}, "tags": ["b"], "priority": 0, "unknown": 1}))
    assert (changed["context"], changed["tags"], changed["priority"]) == ({"k": "v", "l": "w"}, ["b"], 0)
    assert instant(ok(page.patch(path, {"status": "closed"}))["closed_at"])
    for status in ("open", "in_progress", "blocked"):
        assert "closed_at" not in ok(page.patch(path, {"status": status}))
    other = ok(page.post(BEADS, {**new, "type": "bug"}), 201)["id"]
    changed = ok(page.patch(path, {"blocked_by": [other], "related_to": [other], "parent": "", "children": ["bd-001"]}))
    assert (changed["blocked_by"], changed["related_to"], changed["children"]) == ([other], [other], ["bd-001"])
    assert "parent" not in changed
    assert ok(page.get(f"{BEADS}/{other}"))["blocks"] == [bead["id"]]
    for query, ids in (
        ("", ["bd-001", bead["id"], other]),
        ("?project_id=proj-1&type=bug", [other]),
        ("?status=open,blocked&type=feature,bug", [bead["id"], other]),
        ("?assigned_to=nobody", []),
    ):
        assert [each["id"] for each in ok(page.get(BEADS + query))] == ids


def test_a_bead_that_the_page_assigns_is_reserved(page: AppClient) -> None:
    """The page creates a bead, then PATCHes assigned_to."""
    for name in "ab":
        ok(page.post(AGENTS, {"id": name, "persona_name": "w", "project_id": "proj-1"}), 201)
    bead = ok(page.post(BEADS, {"title": "t", "project_id": "proj-1"}), 201)["id"]
    assert ok(page.patch(f"{BEADS}/{bead}", {"assigned_to": "a"}))["status"] == "open"
    refused(page.post(f"{BEADS}/{bead}/claim", {"agent_id": "b"}), 409)
    for _ in range(2):
        assert ok(page.post(f"{BEADS}/{bead}/claim", {"agent_id": "a"}))["status"] == "claimed"
    assert ok(page.get(f"{BEADS}/{bead}"))["status"] == "in_progress"
    assert ok(page.get(f"{AGENTS}/a"))["current_bead"] == bead
    again = ok(page.post(f"{BEADS}/{bead}/redispatch", {"reason": "stuck"}))
    assert (again["status"], again["context"]["redispatch_requested"]) == ("open", "true")
    assert again["context"]["redispatch_reason"] == "stuck"
    assert instant(again["context"]["redispatch_requested_at"])


def test_ids_have_the_projects_prefix(page: AppClient) -> None:
    ok(page.put(f"{PROJECTS}/proj-1", {"bead_prefix": "shop"}))
    assert ok(page.post(BEADS, {"title": "t", "project_id": "proj-1"}), 201)["id"] == "shop-001"
    page.post(BEADS, {"id": "shop-002", "title": "t", "project_id": "proj-1"})
    assert ok(page.post(BEADS, {"title": "t", "project_id": "proj-1"}), 201)["id"] == "shop-003"


def test_ids_go_on_beyond_three_digits(page: AppClient, sql: Sql) -> None:
    for last, key in ((98, "bd-099"), (99, "bd-100"), (998, "bd-999"), (999, "bd-1000"), (1000099, "bd-1000100")):
        sql(f"ALTER SEQUENCE bead_numbers RESTART {last + 1}")
        assert ok(page.post(BEADS, {"title": "t", "project_id": "proj-1"}), 201)["id"] == key


def test_providers(page: AppClient, sql: Sql) -> None:
    (provider,) = ok(page.get(PROVIDERS))
    assert_keys("provider", provider)
    assert (provider["status"], provider["requires_key"], provider["key_id"]) == ("pending", False, "")
    path = PROVIDERS + "/v"
    keyed = ok(page.post(PROVIDERS, {"id": "v", "api_key": "sk-secret", "description": "d"}), 201)
    assert (keyed["requires_key"], keyed["key_id"], keyed["name"], keyed["model"]) == (True, "v-api-key", "V", "m")
    assert "sk-secret" not in str(sql("SELECT to_jsonb(p) FROM providers p")) + str(
        sql("SELECT to_jsonb(e) FROM events e")
    )
    ok(page.put(path, {"tags": ["t"], "context_window": 8192, "cost_per_mtoken": 1.5, "attributes": {"a": 1}}))
    before = ok(page.get(path))
    changed = ok(page.put(path, {"name": "W", "endpoint": "http://w", "type": "ollama", "model": "n"}))
    assert {name for name in before if changed[name] != before[name]} == {
        *("name", "endpoint", "type", "model"),
        *("version", "updated_at"),
    }, "what the page leaves out stays"
    assert ok(page.get(path + "/models")) == {"models": [{"id": "n"}]}
    ok(page.put(path, {"selected_model": "big", "configured_model": "n"}))
    assert ok(page.get(path + "/models")) == {"models": [{"id": "big"}, {"id": "n"}]}
    assert "id" in ok(page.post(PROVIDERS, {"id": "only-id"}), 201)
    assert ok(page.get(PROVIDERS + "/only-id"))["name"] == "only-id"
    assert "name" in refused(page.post(PROVIDERS, {"type": "x"}), 400)
    ok(page.delete(path), 204)
    for call in (page.get, page.delete):
        assert refused(call(path), 404) == "Provider not found"
    assert refused(page.put(path, {"name": "x"}), 404) == "Provider not found"
    assert refused(page.get(path + "/models"), 404) == "Provider not found"


def test_an_empty_name_is_no_name(page: AppClient) -> None:
    agent = ok(page.post(AGENTS, {"name": "", "persona_name": "org/qa", "project_id": "proj-1"}), 201)
    assert agent["name"] == "qa"
    for path in (f"{AGENTS}/{agent['id']}", PROVIDERS + "/v", f"{PROJECTS}/proj-1"):
        name = ok(page.get(path))["name"]
        assert ok(page.put(path, {"name": ""}))["name"] == name
        assert "name" in refused(page.patch(path, {"name": ""}), 400)
    assert ok(page.post(PROVIDERS, {"id": "w", "name": ""}), 201)["name"] == "w"
    assert ok(page.post(PROVIDERS, {"id": "v", "name": ""}), 201)["name"] == "V"


def test_null_is_no_value_for_what_cannot_be_null(page: AppClient) -> None:
    """Only in the calls that the original has; elsewhere it is that of a merge patch."""
    nothing = {"name": None, "description": None, "tags": None, "unknown": None}
    ok(page.post(PROVIDERS, {"id": "w", "name": "W", "model": None, "is_shared": None, "tags": None}), 201)
    assert ok(page.put(PROVIDERS + "/w", nothing))["name"] == "W"
    assert "name" in refused(page.patch(PROVIDERS + "/w", {"name": None}), 400)
    agent = {"name": None, "persona_name": "qa", "project_id": "proj-1", "provider_id": None, "capabilities": None}
    made = ok(page.post(AGENTS, agent), 201)
    assert made["name"] == "qa"
    assert ok(page.put(f"{AGENTS}/{made['id']}", {"name": None, "persona": {"a": None}}))["persona"] == {"a": None}
    assert "project_id" in refused(page.post(AGENTS, {**agent, "project_id": None}), 400)
    project = {"name": "n", "git_repo": "r", "branch": "b", "context": None, "is_sticky": None, "beads_path": None}
    ok(page.post(PROJECTS, project), 201)
    assert (
        ok(page.put(f"{PROJECTS}/proj-1", {"status": None, "is_perpetual": None, "name": None}))["name"] == "Web shop"
    )
    new = {"title": "t", "project_id": "proj-1", "type": None, "priority": None, "tags": None, "context": None}
    bead = ok(page.post(BEADS, {**new, "parent": None, "assigned_to": None}), 201)
    assert (bead["type"], bead["priority"]) == ("task", 2)
    path = f"{BEADS}/{bead['id']}"
    ok(page.patch(path, {"estimated_time": 5, "context": {"a": 1, "b": 2}}))
    changed = ok(page.patch(path, {"title": None, "tags": None, "estimated_time": None, "context": {"a": None}}))
    assert (changed["title"], changed["context"], "estimated_time" in changed) == ("t", {"b": 2}, False)
    assert "title" in refused(page.put(path, {"title": None}), 400)
    for call, body in (("claim", {"agent_id": made["id"], "lease_seconds": None}), ("redispatch", {"reason": None})):
        ok(page.post(f"{path}/{call}", body))
    assert ok(page.post(f"{PROJECTS}/proj-1/agents", {"agent_id": made["id"], "action": None}))["agents"]
    lock = {"file_path": "f", "project_id": "proj-1", "agent_id": made["id"], "bead_id": None}
    ok(page.post("/api/v1/file-locks", lock), 201)
    assert ok(page.put("/api/v1/config", {"agents": None, "logging": None}))["agents"]


def test_what_the_page_reads_besides_is_there(page: AppClient) -> None:
    assert ok(page.get("/api/v1/health")) == {"status": "ok"}
    health = ok(page.get("/health"))
    assert {*["status", "timestamp", "instance_id", "uptime_seconds", "version", "dependencies", "metrics"]} <= {
        *health
    }
    assert {"status", "timestamp"} <= {*ok(page.get("/health/live"))}
    assert {"ready", "timestamp", "dependencies"} <= {*ok(page.get("/health/ready"))}
    assert {"beads", "edges", "updated_at"} == {*ok(page.get("/api/v1/work-graph?project_id=proj-1"))}
    events = ok(page.get("/api/v1/events?project_id=proj-1&type=project.created&limit=5"))
    assert events["count"] == len(events["events"]) == 1
    assert {*["id", "type", "timestamp", "source", "data", "project_id"]} <= {*events["events"][0]}
    assert {*["server", "database", "beads", "agents"]} <= {*ok(page.get("/api/v1/config"))}
    assert page.get("/api/v1/config/export.yaml").headers["Content-Type"] == "application/x-yaml"
    assert page.request("OPTIONS", BEADS).status == 200
