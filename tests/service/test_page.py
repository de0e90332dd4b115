"""The operator's page without a browser: what is shown, what is refused, and what cannot be slipped into it."""

from __future__ import annotations

import re
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from harness import AppClient, Postgres, wait_until
from harness.locks import Sql, acquire
from harness.scene import VIEWS, play, wait_in_line
from harness.work import ask, bead, claim, fail, get, patch, seed_beads, team

from loom.http import metrics
from loom.instances import Instance
from loom.page import charts, render
from loom.traffic import Recorder, Traffic, last_hour, shares

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " frame-ancestors 'none'; base-uri 'none'"
)
HOSTILE = "<script>alert(1)</script>\"'&x"


class Inline(HTMLParser):
    """What the policy for content forbids, and what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attributes}
        if tag == "style" or (tag == "script" and "src" not in names) or "style" in names:
            self.found.append(tag)
        self.found += [f"{tag} {name}" for name in names if name.startswith(("on", "hx-on"))]
        self.found += [f"{tag} {value}" for _, value in attributes if (value or "").lower().startswith("javascript:")]


def text(client: AppClient, path: str, status: int = 200) -> str:
    """What a page says, in one line without its tags."""
    answer = client.get(path)
    assert answer.status == status, answer
    return " ".join(unescape(re.sub("<[^>]*>", " ", answer.body.decode())).split())


def act(client: AppClient, action: str, **form: object) -> tuple[int, str]:
    """Sends the form of an action: the status, and where it leads or what it says."""
    answer = client.post(f"/actions/{action}", urlencode(form).encode())
    return answer.status, answer.headers.get("Location") or answer.body.decode()


def test_each_view_obeys_the_policy_for_content_and_is_stored_nowhere(client: AppClient, sql: Sql) -> None:
    play([client], sql)
    wait_in_line(client, "cache", "other")
    for name, path in VIEWS.items():
        answer = client.get(path)
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8"), name
        assert answer.headers["Content-Security-Policy"] == POLICY
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        parser = Inline()
        parser.feed(answer.body.decode())
        assert parser.found == [], name


def test_static_files_are_kept_for_ever_by_an_address_that_changes_with_them(client: AppClient) -> None:
    page = client.get("/").body.decode()
    addresses = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    assert len(addresses) == 4
    for address in addresses:
        answer = client.get(address)
        assert (answer.status, answer.headers["X-Content-Type-Options"]) == (200, "nosniff")
        assert "immutable" in answer.headers["Cache-Control"]
        other = client.get(address.replace(address.split("/")[2], "0" * 16))
        assert (other.body, other.headers["Cache-Control"]) == (answer.body, "no-store"), "as during an update"
    assert client.get("/static/x/..%2frender.py").status == 404


def test_an_installation_includes_templates_and_static_files() -> None:
    setup = (Path(render.__file__).parents[2] / "setup.cfg").read_text()
    assert "loom.page = templates/*.html, static/*" in setup


def test_it_says_in_one_sentence_whether_all_is_well(client: AppClient, sql: Sql, instance: Instance) -> None:
    assert "All is well: 1 instance is active." in text(client, "/")
    sql("INSERT INTO instances (instance_id, hostname, status) VALUES (gen_random_uuid(), 'far', 'dead')")
    assert "1 instance is active; far:? is dead" in text(client, "/locks")
    sql("DELETE FROM instances WHERE hostname <> 'far'")
    assert "Nothing is served: no instance is active" in text(client, "/")


def test_every_view_has_something_to_say_when_there_is_nothing(client: AppClient) -> None:
    said = text(client, "/")
    for sentence in ("No lock is held.", "No bead is claimed.", "No bead is ready.", "no requests in this hour"):
        assert sentence in said
    assert "No lock is held. An agent takes one with POST" in text(client, "/locks")
    assert "No bead is stuck." in text(client, "/stuck")
    assert "There are no agents." in text(client, "/agents")
    assert "There are no providers." in text(client, "/providers")
    assert "Nothing is shared." in text(client, "/config")
    assert "The lock is free." in text(client, "/lock?name=never")
    for path in ("/beads", "/ready", "/leases", "/events", "/search?q=x", "/search"):
        text(client, path)


def test_what_is_not_there_is_a_page_that_says_so(client: AppClient) -> None:
    for path in ("/bead?id=x", "/agent?id=x", "/provider?id=x", "/instance?id=x", "/setting?key=x", "/bead"):
        assert "not found" in text(client, path, 404) or "no such" in text(client, path, 404)
    assert "cursor" in text(client, "/lock?name=x&before=%00", 400)
    assert "no such action" in text(client, "/actions/none", 404)
    assert client.post("/").status == 405


@pytest.mark.parametrize("name", [HOSTILE, "a/b c", "../x", "ü😀", "x" * 255, "{{ 1357 * 1357 }}", "%00%0A"])
def test_no_name_is_taken_for_markup_or_for_another_name(client: AppClient, name: str) -> None:
    answer = client.post(f"/api/v1/locks/{quote(name, safe='')}", {"owner": name[:255], "ttl_seconds": 60})
    key, status = name.replace("/", "_")[:200], answer.status
    assert status in (201, 400)
    team(client, "a")
    bead(client, key, title=name, description=name)
    for path in ("/", "/locks", "/beads", "/events", f"/search?{urlencode({'q': name})}"):
        page = client.get(path).body.decode()
        assert "<script>alert" not in page
        assert "1841449" not in re.sub("[^<>]*<title.*?</title>", "", page) or "1357" not in name
    assert name[:20] in text(client, f"/bead?{urlencode({'id': key})}").replace("\xa0", " ")
    if status == 201:
        assert name[:20] in text(client, f"/lock?{urlencode({'name': name})}")
        page = client.get("/locks").body.decode()
        assert f'href="/lock?{urlencode({"name": name})}"' in unescape(page)


def test_a_lock_shows_its_holder_its_waiters_and_who_held_it(client: AppClient) -> None:
    first = acquire(client, owner="first")["fencing_token"]
    client.delete(f"/api/v1/locks/build?fencing_token={first}")
    acquire(client, owner="second", ttl_seconds=300)
    wait_in_line(client, "build", "third", "fourth")
    said = text(client, "/lock?name=build")
    assert re.search(r"Ends in (5 min|4 min 5\d s) Holder second Token \d+", said)
    assert "Waiting third fourth" in said
    assert re.search(rf"second \d+ [\d:]+ \d s held first {first} [\d:]+ \d s released", said)


def test_a_bead_shows_what_it_waits_for_what_waits_for_it_and_its_history(client: AppClient) -> None:
    team(client, "a")
    bead(client, "base")
    bead(client, "middle", blocked_by=["base"])
    bead(client, "child", parent="middle")
    bead(client, "top", blocked_by=["middle"])
    said = text(client, "/bead?id=middle")
    assert re.search("Waits for base open base child open child Waiting for it top open top", said)
    fail(client, "base", claim(client, "base"), reason="no disk")
    said = text(client, "/bead?id=base")
    assert "Waiting for it middle open middle top open top" in said
    assert re.search("Earlier claims.* a [\\d:]+ \\d s failed no disk", said)
    assert "bead.created" in said


def test_a_chain_of_many_beads_is_cut(client: AppClient, sql: Sql) -> None:
    team(client)
    seed_beads(sql, 3000, blocked_by="CASE WHEN n > 0 THEN '{b0}'::text[] ELSE '{}' END")
    patch(client, "b0", status="blocked")
    page = client.get("/stuck").body.decode()
    assert page.count('class="node"') == 101
    assert len(page) < 200_000


def test_lists_have_pages_that_follow_each_other(client: AppClient, sql: Sql) -> None:
    team(client)
    seed_beads(sql, 120, key="'b' || lpad(n::text, 3, '0')")
    seen: list[str] = []
    path = "/beads"
    while True:
        page = client.get(path).body.decode()
        seen += re.findall(r'href="/bead\?id=(b\d+)"', page)
        more = re.search(r'rel="next" href="([^"]+)"', page)
        if more is None:
            break
        path = unescape(more[1])
    assert seen == [f"b{n:03}" for n in range(120)]
    ids = []
    path = "/events"
    for n in range(60):
        client.put("/api/v1/config/n", {"value": n})
    while True:
        page = client.get(path).body.decode()
        ids += re.findall(r"<b>value</b> <code>(\d+)</code>", page)
        more = re.search(r'rel="next" href="([^"]+)"', page)
        if more is None:
            break
        path = unescape(more[1])
    assert ids == [str(n) for n in reversed(range(60))]


def test_the_search_finds_by_the_beginning_of_name_or_id(client: AppClient, instance: Instance) -> None:
    team(client, "alpha")
    client.post("/api/v1/agents", {"id": "z", "name": "Alfred", "persona_name": "w", "project_id": "p"})
    bead(client, "al-1")
    acquire(client, "al/lock")
    said = text(client, "/search?q=al")
    for found in ("lock al/lock", "bead al-1", "agent alpha", "agent z Alfred"):
        assert found in said
    assert "nothing" not in said
    assert instance.instance_id in text(client, f"/search?q={instance.instance_id[:8]}")
    assert "Nothing begins so" in text(client, "/search?q=l-1")


class TestActions:
    def test_a_lock_is_released_by_its_token_with_a_reason_that_the_history_keeps(self, client: AppClient) -> None:
        token = acquire(client, owner="stuck")["fencing_token"]
        asked = text(client, f"/actions/release-lock?name=build&token={token}")
        assert "Holder now stuck" in asked
        assert "Its holder loses it at once" in asked
        status, page = act(client, "release-lock", name="build", token=token, reason="  ")
        assert (status, "Say why" in page) == (400, True)
        assert client.get("/api/v1/locks/build").status == 200, "nothing without a reason"
        status, where = act(client, "release-lock", name="build", token=token, reason="its host is gone")
        assert status == 303
        said = text(client, where)
        assert "The lock was released." in said
        assert "forced its host is gone" in said

    def test_a_lock_that_another_holds_by_now_is_not_released(self, client: AppClient) -> None:
        token = acquire(client, owner="a")["fencing_token"]
        client.delete(f"/api/v1/locks/build?fencing_token={token}")
        acquire(client, owner="b")
        status, page = act(client, "release-lock", name="build", token=token, reason="late")
        assert (status, "Another grant holds the lock now." in page) == (409, True)
        assert client.get("/api/v1/locks/build").json["owner"] == "b"

    def test_a_bead_is_given_back_and_its_agent_has_lost_it(self, client: AppClient) -> None:
        team(client, "a")
        bead(client, "x")
        token = claim(client, "x")
        assert act(client, "give-back-bead", id="x", token=token, reason="wrong agent")[0] == 303
        assert (get(client, "x")["status"], get(client, "x")["attempts"]) == ("open", 0)
        assert client.post("/api/v1/beads/x/complete", {"fencing_token": token}).status == 409
        assert "released wrong agent" in text(client, "/bead?id=x")

    def test_a_bead_is_unblocked_unless_it_has_changed_since(self, client: AppClient) -> None:
        team(client, "a")
        bead(client, "x")
        patch(client, "x", status="blocked")
        version = get(client, "x")["version"]
        page = client.get("/bead?id=x").body.decode()
        assert unescape(page).count(f"/actions/unblock-bead?id=x&version={version}") == 1
        patch(client, "x", title="changed")
        assert act(client, "unblock-bead", id="x", version=version, reason="ready")[0] == 412
        assert get(client, "x")["status"] == "blocked"
        assert act(client, "unblock-bead", id="x", version=version + 1, reason="key is there")[0] == 303
        assert get(client, "x")["status"] == "open"
        assert get(client, "x")["context"]["redispatch_reason"] == "key is there"
        (first, *_) = client.get("/api/v1/beads/x/history").json
        assert first["actor"] == "operator"
        assert ask(client, "x").status == 200

    def test_an_instance_drains_and_is_active_again(self, client: AppClient, instance: Instance) -> None:
        own = instance.instance_id
        assert "It is the only active instance" in text(client, f"/actions/drain-instance?id={own}")
        assert act(client, "drain-instance", id=own, reason="new kernel")[0] == 303
        instance.beat()
        assert client.get("/health/ready").status == 503
        said = text(client, f"/instance?id={own}")
        assert "Status draining" in said
        assert "new kernel" in said
        assert act(client, "activate-instance", id=own, reason="done")[0] == 303
        instance.beat()
        assert client.get("/health/ready").status == 200

    @pytest.mark.parametrize(
        ("action", "form"),
        [
            ("release-lock", {"name": "x", "token": "0x1"}),
            ("release-lock", {"name": "x", "token": "9" * 30}),
            ("release-lock", {"name": "x"}),
            ("give-back-bead", {"id": "x", "token": "-1"}),
            ("unblock-bead", {"id": "x", "version": "²"}),
            ("give-back-bead", {"token": "1"}),
            ("drain-instance", {"id": "\0"}),
            ("drain-instance", {}),
        ],
    )
    def test_a_form_that_names_nothing_is_refused(self, client: AppClient, action: str, form: dict[str, str]) -> None:
        assert act(client, action, reason="why", **form)[0] in (400, 404)

    def test_a_body_that_is_no_form_is_refused(self, client: AppClient) -> None:
        for body in (b"\xff\xfe", b"&" * 50, b"a=1&" * 50, b"%"):
            assert client.post("/actions/release-lock", body).status == 400
        assert client.post("/actions/release-lock", b"x" * 2_000_000).status == 413


def test_the_traffic_of_a_minute_is_written_once_by_each_instance(client: AppClient, instance: Instance) -> None:
    recorder = Recorder(metrics.traffic)
    recorder.record()
    from loom import db

    with db.connection() as conn:
        before = shares(conn)
        acquire(client, owner="a")
        for _ in range(3):
            client.get("/api/v1/locks/build")
        client.get("/health")
        recorder.record()
        recorder.record()
        found = last_hour(conn)
    acquired, others = found["acquire"][-1] or found["acquire"][-2], found["request"][-1] or found["request"][-2]
    assert acquired is not None
    assert others is not None
    assert sum(acquired.counts) == acquired.requests >= 1
    assert sum(others.counts) == others.requests >= 3
    assert before in ({}, {instance.instance_id: 1.0})
    assert "Requests per second" in text(client, "/")


def test_a_quantile_lies_in_its_bucket() -> None:
    assert charts.quantile([100, 0, 0, 0, 0, 0, 0], 0.95) == pytest.approx(0.00475)
    assert charts.quantile([90, 10, 0, 0, 0, 0, 0], 0.95) == pytest.approx(0.015)
    assert charts.quantile([0, 0, 0, 0, 0, 0, 1], 0.95) == pytest.approx(19.5)
    assert charts.quantile([0] * 7, 0.95) == 0


def test_a_chart_is_broken_where_there_was_nothing() -> None:
    one = Traffic(60, 0, 0.6, [60, 0, 0, 0, 0, 0, 0])
    _, answers, _ = charts.hour({"request": [one, one, None, one]}, 30.0)
    assert answers.lines[0].path.count("M") == 2
    assert answers.lines[0].now == "10 ms"
    rates, _, _ = charts.hour({"request": [one, one]}, 30.0)
    assert rates.lines[0].now == "2.0/s", "the last minute is under way"
    assert all(chart.empty for chart in charts.hour({}, 30.0))


def test_the_contract_is_rendered_with_every_operation(client: AppClient) -> None:
    said = text(client, "/api")
    assert "POST /api/v1/locks/{name}" in said
    assert "ttl_seconds body integer (at least 1, at most 86400, default 30)" in said
    assert 'href="/api/openapi.yaml"' in client.get("/api").body.decode()


class TestOutage:
    @pytest.fixture
    def postgres(self, own_postgres: Postgres) -> Postgres:
        """A server of the test's own, which it may stop."""
        return own_postgres

    def test_without_a_database_it_says_since_when_and_what_to_do(self, client: AppClient, postgres: Postgres) -> None:
        before = time.strftime("%H:%M", time.gmtime())
        postgres.stop()
        wait_until(lambda: client.get("/").status == 503)
        wait_until(lambda: "since" in text(client, "/", 503))
        after = time.strftime("%H:%M", time.gmtime())
        answer = client.get("/locks")
        assert answer.headers["Content-Security-Policy"] == POLICY
        assert answer.headers["Retry-After"] == "1"
        said = text(client, "/bead?id=x", 503)
        since = re.search(r"Nothing is served: the database is away since (\d\d:\d\d):\d\d UTC, \d+ s ago", said)
        assert since is not None, said
        assert since[1] in (before, after)
        assert "What to do" in said
        assert "loom doctor" in said
        assert act(client, "drain-instance", id="x", reason="y")[0] == 503
        assert client.get("/api").status == 200, "the contract needs no database"
        postgres.start()
        wait_until(lambda: client.get("/").status == 200)
