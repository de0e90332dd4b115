"""What an agent's key may do to its own and to what is another's: tokens, owners and ids are no credentials."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flask import Flask
from harness import AppClient
from harness.client import Answer, Methods
from harness.cluster import ROOT
from harness.locks import Sql, assert_problem

from loom import db
from loom.bounds import bounds
from loom.config import SecurityConfig
from loom.http import permissions, pollers
from loom.state import keys

API = "/api/v1"
PROJECT = {"id": "p", "name": "p", "git_repo": "r", "branch": "b"}


class Keyed(Methods):
    """A client with a key."""

    def __init__(self, client: AppClient, key: str) -> None:
        self._client, self._key = client, key

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        return self._client.request(method, f"{API}/{path}", body, {"X-API-Key": self._key, **(headers or {})})


@pytest.fixture
def callers(app: Flask, client: AppClient, database: db.Database) -> Callable[[str], Keyed]:
    """One with a key of each role; a and b are agents. Agent a has claimed the bead `held`, and `free` is open."""
    app.config["LOOM"] = replace(app.config["LOOM"], security=SecurityConfig(auth="on"))
    made: dict[str, Keyed] = {}
    with database.connection() as conn:
        for name, role in (("admin", "admin"), ("reader", "reader"), ("a", "agent"), ("b", "agent")):
            made[name] = Keyed(client, keys.create(conn, name, role, by=None).key)  # type: ignore[arg-type]
    admin, a = made["admin"], made["a"]
    assert admin.post("projects", PROJECT).status == 201
    for agent in ("a", "b"):
        registered = {"id": agent, "persona_name": "x", "project_id": "p"}
        assert made[agent].post("agents", registered).status == 201
    for bead in ("held", "free"):
        assert a.post("beads", {"id": bead, "title": bead, "project_id": "p"}).status == 201
    assert a.post("beads/held/claim", {"agent_id": "a"}).status == 200
    return made.__getitem__


Callers = Callable[[str], Keyed]


def token(callers: Callers, bead: str = "held") -> int:
    """As everybody can read it."""
    return callers("reader").get(f"beads/{bead}").json["fencing_token"]


def test_a_token_read_by_another_ends_no_claim(callers: Callers) -> None:
    a, b = callers("a"), callers("b")
    mine = {"fencing_token": token(callers)}
    for answer in (
        b.post("beads/held/complete", mine),
        b.post("beads/held/fail", mine),
        b.put("beads/held/claim", mine),
        b.delete(f"beads/held/claim?fencing_token={mine['fencing_token']}"),
    ):
        assert_problem(answer, 409, "claim-lost")
    assert_problem(b.post("beads/held/claim", {"agent_id": "a"}), 403, "forbidden")
    assert_problem(b.post("beads/claim", {"agent_id": "a"}), 403, "forbidden")
    assert_problem(b.post("agents/a/heartbeat", {"claims": {"held": mine["fencing_token"]}}), 403, "forbidden")
    assert b.post("agents/b/heartbeat", {"claims": {"held": mine["fencing_token"]}}).json["extended"] == {}
    assert a.put("beads/held/claim", mine).status == 200
    assert "held" in a.post("agents/a/heartbeat", {"claims": {"held": mine["fencing_token"]}}).json["extended"]
    assert a.post("beads/held/complete", mine).status == 200
    assert_problem(b.post("beads/held/complete", mine), 409, "claim-lost")
    assert a.post("beads/held/complete", mine).status == 200, "a repetition"


def test_a_token_or_an_owner_of_another_opens_no_lock(callers: Callers) -> None:
    a, b, admin = callers("a"), callers("b"), callers("admin")
    grant = a.post("locks/build", {"owner": "me"}).json
    public = callers("reader").get("locks/build").json
    assert public["fencing_token"] == grant["fencing_token"], "it orders, and everybody may know it"
    assert_problem(b.post("locks/build", {"owner": "me"}), 409, "lock-held")
    for other in (b, admin):
        assert_problem(other.put("locks/build", {"fencing_token": grant["fencing_token"]}), 409, "lock-lost")
        refused = other.delete(f"locks/build?fencing_token={grant['fencing_token']}")
        assert_problem(refused, 409, "lock-lost")
    fenced = {"Loom-Lock-Token": f'{grant["fencing_token"]}; lock="build"'}
    assert_problem(b.patch("beads/free", {"title": "x"}, headers=fenced), 409, "lock-lost")
    assert a.patch("beads/free", {"title": "x"}, headers=fenced).status == 200
    assert a.post("locks/build", {"owner": "me"}).status == 200
    assert a.put("locks/build", {"fencing_token": grant["fencing_token"]}).status == 200
    assert_problem(
        b.delete(f"locks/build?force=true&fencing_token={grant['fencing_token']}&reason=x"), 403, "forbidden"
    )
    forced = f"locks/build?force=true&fencing_token={grant['fencing_token']}"
    assert assert_problem(admin.delete(forced), 400, "invalid")["errors"][0]["field"] == "reason"
    assert admin.delete(f"{forced}&reason=stuck").status == 204


def test_two_principals_that_call_their_owners_alike_wait_apart(callers: Callers, sql: Sql) -> None:
    a, b = callers("a"), callers("b")
    callers("admin").post("locks/build", {"owner": "me", "ttl_seconds": 60})
    for waiter in (a, b):
        sql("SELECT acquire_lock('build', 'me', NULL, '1 s', NULL, true, %s)", "a" if waiter is a else "b")
    assert sql("SELECT owner FROM lock_waiters ORDER BY place") == [("a/me",), ("b/me",)]
    sql("DELETE FROM distributed_locks")
    assert_problem(b.post("locks/build", {"owner": "me"}), 409, "lock-held")
    assert a.post("locks/build", {"owner": "me"}).status == 201


@pytest.mark.parametrize(
    ("name", "mine", "others"),
    [
        ("agent:a", 201, 403),
        ("agent:b", 403, 201),
        ("bead:held", 201, 403),
        ("bead:free", 201, 409),
        ("config:k", 403, 403),
        ("provider:x", 403, 403),
        ("project:p", 403, 403),
        ("file:p:f", 403, 403),
        ("loom:upkeep", 400, 400),
        ("anything", 201, 409),
    ],
)
def test_a_name_that_concerns_another_is_not_for_an_agent(callers: Callers, name: str, mine: int, others: int) -> None:
    body = {"owner": "x", "ttl_seconds": 60}
    assert callers("a").post(f"locks/{name}", body).status == mine
    assert callers("b").post(f"locks/{name}", body).status == others


def test_nobody_acts_for_another_agent_or_as_loom(callers: Callers, sql: Sql) -> None:
    a, b, admin = callers("a"), callers("b"), callers("admin")
    assert_problem(b.patch("agents/a", {"status": "dead"}), 403, "forbidden")
    assert_problem(b.put("agents/a", {"name": "x"}), 403, "forbidden")
    assert b.patch("agents/b", {"status": "paused"}).status == 200
    file = {"file_path": "f", "project_id": "p"}
    assert_problem(b.post("file-locks", {**file, "agent_id": "a"}), 403, "forbidden")
    assert a.post("file-locks", {**file, "agent_id": "a"}).status == 201
    assert_problem(b.delete("file-locks/p/f?agent_id=a"), 403, "forbidden")
    assert a.delete("file-locks/p/f?agent_id=a").status == 204
    assert_problem(b.post("beads/free/comments", {"content": "c", "author_id": "a"}), 403, "forbidden")
    assert b.post("beads/free/comments", {"content": "c"}).json["author_id"] == "b"
    # An agent that it has registered itself; but not one whose name a key has.
    assert b.post("agents", {"id": "b-2", "persona_name": "x", "project_id": "p"}).status == 201
    assert b.post("beads/free/claim", {"agent_id": "b-2"}).status == 200
    assert_problem(b.post("agents", {"id": "reader", "persona_name": "x", "project_id": "p"}), 403, "forbidden")
    for actor in ("system:upkeep", "sql:loom"):
        assert_problem(admin.patch("beads/free", {"title": "x"}, headers={"Loom-Actor": actor}), 403, "forbidden")
    assert_problem(b.post("beads", {"title": "x", "project_id": "p"}, headers={"Loom-Actor": "ann"}), 403, "forbidden")
    assert admin.patch("beads/held", {"title": "x"}, headers={"Loom-Actor": "ann"}).status == 200
    last = "SELECT actor, principal FROM events WHERE entity_id = %s ORDER BY place DESC LIMIT 1"
    assert sql(last, "held") == [("ann", "admin")]
    assert sql(last, "free") == [("b-2", "b")]
    sql("UPDATE beads SET title = 'by hand' WHERE id = 'free'")
    assert sql(last, "free")[0][0].startswith("sql:")


def test_an_agent_changes_no_bead_that_another_works_on(callers: Callers) -> None:
    a, b = callers("a"), callers("b")
    new = {"title": "x", "project_id": "p"}
    for answer in (
        b.patch("beads/held", {"status": "open"}),
        b.put("beads/held", {"title": "x"}),
        b.patch("beads/free", {"blocks": ["held"]}),
        b.post("beads", {**new, "children": ["held"]}),
        b.post("beads/bulk", {"beads": [{**new, "blocks": ["held"]}]}),
    ):
        assert_problem(answer, 403, "forbidden")
    assert b.patch("beads/free", {"title": "y"}).status == 200
    assert b.post("beads/bulk", {"beads": [{**new, "blocks": ["free"]}]}).status == 201
    assert a.patch("beads/held", {"title": "z"}).status == 200
    assert callers("admin").patch("beads/held", {"title": "z"}).status == 200
    assert callers("admin").post("beads/held/redispatch", {}).status == 400
    assert callers("admin").post("beads/held/redispatch", {"reason": "stuck"}).status == 200


def test_settings_and_what_they_tell_of_hosts_are_the_administrators(callers: Callers) -> None:
    a, reader, admin = callers("a"), callers("reader"), callers("admin")
    assert a.put("config/team.policy", {"value": 1}).status == 200
    assert_problem(a.put("config/logging.level", {"value": "debug"}), 403, "forbidden")
    assert admin.put("config/logging.level", {"value": "debug"}).status == 200
    for client, shown in ((reader, False), (a, False), (admin, True)):
        sections = client.get("config").json
        assert (sections["server"]["host"] != "***") == shown
        assert (sections["database"]["dsn"] != "***") == shown


def test_one_principal_cannot_take_all_places_of_those_that_wait(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers("admin").post("locks/build", {"owner": "me", "ttl_seconds": 60})
    monkeypatch.setattr(pollers, "bounds", replace(bounds, waiting_of_key=0))
    started = time.monotonic()
    assert_problem(callers("a").post("locks/build", {"owner": "x", "wait_seconds": 20}), 409, "lock-held")
    assert time.monotonic() - started < 10


def test_an_idempotency_key_of_another_finds_nothing(callers: Callers) -> None:
    once = {"Idempotency-Key": "k"}
    first = callers("a").post("beads", {"title": "x", "project_id": "p"}, headers=once)
    again = callers("b").post("beads", {"title": "x", "project_id": "p"}, headers=once)
    assert "Idempotency-Replayed" not in again.headers
    assert first.json["id"] != again.json["id"]


def test_docs_show_the_table_of_permissions() -> None:
    rows = []
    for rule, text in permissions.TABLE.items():
        path = re.sub("<(?:name:_|([^>]*))>", lambda m: "{" + (m[1] or "name") + "}", rule)
        cells = {
            role: " ".join(m for m in part.split()[:-1]) for part in text.split(", ") for role in [part.split()[-1]]
        }
        rows.append("| `" + path + "` | " + " | ".join(cells.get(role, "") for role in permissions.RANKS) + " |")
    table = "\n".join(["| path | everybody | reader | agent | admin |", "|---|---|---|---|---|", *rows])
    assert table in (ROOT / "docs/security.md").read_text(), f"docs/security.md must have this table:\n{table}"
