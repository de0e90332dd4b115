"""What a client sees through a real nginx with our own configuration."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import quote

import pytest
from harness import Client, Cluster, Postgres, wait_until
from harness.load import Load, get

MIB = 1024 * 1024
LOCKS = "/api/v1/locks/"


@pytest.fixture(scope="module")
def shared(postgres: Postgres) -> Iterator[tuple[Cluster, str]]:
    """Two instances behind nginx, for tests that only send requests, and the name of their database."""
    name = postgres.database()
    with contextlib.closing(Cluster(postgres.dsn(name), 2, nginx=True)) as cluster:
        yield cluster, name
    postgres.drop(name)


@pytest.fixture
def nginx(shared: tuple[Cluster, str], postgres: Postgres) -> Iterator[Client]:
    """A connection to nginx in front of two instances, without any lock."""
    cluster, name = shared
    postgres.query("DELETE FROM distributed_locks", database=name)
    with contextlib.closing(Client(cluster.nginx_url)) as client:
        yield client


class DyingServer:
    """Accepts requests on an instance's port and closes each connection without an answer, as a killed worker does."""

    def __init__(self, port: int) -> None:
        self.methods: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", port))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    self.methods[connection.recv(65536).split()[0].decode()] += 1

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


def encoded(name: str) -> str:
    return quote(name, safe="")


def test_lock_names_reach_an_instance_unchanged(nginx: Client) -> None:
    names = [
        "a b",
        "a:b",
        "(a)",
        "ü€",
        "\N{ROCKET}",
        "a/b",
        "a%2Fb",
        "a%252Fb",
        "a+b",
        "a;b=c",
        "a?b#c",
        "a\\b",
        "'\"",
        "grants",
    ]
    names += ["a/.../b", "~", "&", "a%", "%00", "%c3%28", "\N{ROCKET}" * 255]
    for name in names:
        taken = nginx.post(LOCKS + encoded(name), {"owner": "me"})
        assert (taken.status, taken.json["lock_name"]) == (201, name)
        assert nginx.get(LOCKS + encoded(name)).json["lock_name"] == name
    assert {lock["lock_name"] for lock in nginx.get("/api/v1/locks").json} == set(names)


def test_a_slash_in_a_name_may_be_encoded_or_not(nginx: Client) -> None:
    first, second = (nginx.post(LOCKS + path, {"owner": "me"}) for path in ("a/b", "a%2Fb"))
    assert (first.status, second.status) == (201, 200)
    assert first.json["fencing_token"] == second.json["fencing_token"]


def test_a_bad_name_is_refused_and_never_changed_into_another(nginx: Client) -> None:
    bad = [
        "a//b",
        "a%2F%2Fb",
        "a/../b",
        "a%2F..%2Fb",
        "a/%2e%2e/b",
        "a/./b",
        "..",
        "%2e%2e",
        "../../../../x",
        "a/",
        "/a",
        "%2Fa",
    ]
    bad += ["%00", "a%0Ab", "%FF", "%C3%28", "x" * 256]
    for path in bad:
        answer = nginx.post(LOCKS + path, {"owner": "me"})
        assert (path, answer.status) == (path, 400)
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json["type"] == "/problems/invalid"
    assert nginx.get("/api/v1/locks").json == []


def test_a_request_id_is_passed_on_or_generated(nginx: Client) -> None:
    def answered(request_id: str | None) -> str:
        headers = {} if request_id is None else {"X-Request-ID": request_id}
        return nginx.get("/health/live", headers=headers).headers["X-Request-ID"]

    for own in ("7f3b2c4e-0000-4000-8000-1234567890ab", "job:17/step=2", "x" * 128):
        assert answered(own) == own
    for invalid in (None, "", "two words", 'a"b', "x" * 129, "\xfc"):
        assert re.fullmatch("[0-9a-f]{32}", answered(invalid))
    assert answered(None) != answered(None)


def test_a_body_over_the_limit_is_refused_with_the_same_problem_as_by_loom(nginx: Client) -> None:
    def refused(size: int, path: str = "x") -> tuple[int, str, str]:
        answer = nginx.post(LOCKS + path, b'{"owner":"' + b"x" * (size - 12) + b'"}')
        return answer.status, answer.headers["Content-Type"], answer.json["type"]

    assert refused(MIB) == (400, "application/problem+json", "/problems/invalid")  # passed on; the owner is too long
    assert refused(MIB + 1) == (413, "application/problem+json", "/problems/too-large")
    assert refused(3 * MIB) == (413, "application/problem+json", "/problems/too-large")


def test_an_import_may_have_a_larger_body(nginx: Client) -> None:
    path = "/api/v1/config/import.yaml"
    assert nginx.post(path, b"a: 1\n" + b"#" * (5 * MIB - 5)).json["shared"] == {"a": 1}
    answer = nginx.post(path, b"a: 2\n" + b"#" * (5 * MIB - 4))
    assert (answer.status, answer.json["type"]) == (413, "/problems/too-large")
    assert nginx.get("/api/v1/config/a").json["value"] == 1


def test_a_request_line_or_header_that_is_too_long_is_refused_as_a_problem(nginx: Client) -> None:
    assert nginx.get("/" + "x" * 8000).status == 404  # reached an instance
    for status, answer in [
        (414, nginx.get("/" + "x" * 9000)),
        (431, nginx.get("/health/live", headers={"X": "x" * 9000})),
    ]:
        assert (answer.status, answer.json["status"]) == (status, status)
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.headers["X-Request-ID"]


def raw(port: int, text: bytes) -> bytes:
    """What the server answers to these bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        with contextlib.suppress(OSError):  # it may refuse the rest
            sock.sendall(text)
        answer = b""
        with contextlib.suppress(OSError):
            while data := sock.recv(65536):
                answer += data
        return answer


def chunked(path: str, size: int) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"10000\r\n%b\r\n" % (b"#" * 65536) * (size // 65536) + b"0\r\n\r\n"


@pytest.mark.parametrize("behind", ["nginx", "an instance"])
@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET /%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % (b"x" * 40_000), 414),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %s\r\nConnection: close\r\n\r\n" % (b"x" * 40_000), 431),
        (b"POST /api/v1/beads HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: nonsense\r\n\r\n", 501),
        (b"POST /api/v1/beads HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /api/v1/beads HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{}}\r\n", 400),
        (chunked("/api/v1/config/import.yaml", 5 * MIB + 65536), 413),
        (chunked("/api/v1/config/import.yaml", 12 * MIB), 413),
        (chunked("/api/v1/beads", 2 * MIB), 413),
    ],
    ids="line,length,uri,header,encoding,chunk,chunk end,import,large import,body".split(","),  # noqa: SIM905
)
def test_an_error_before_the_application_is_a_problem_too(
    start_cluster: Callable[..., Cluster], behind: str, request_bytes: bytes, status: int
) -> None:
    cluster = start_cluster(1, nginx=True)
    port = int(cluster.nginx_url.rpartition(":")[2]) if behind == "nginx" else cluster.ports[0]
    head, _, body = raw(port, request_bytes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert b"content-type: application/problem+json" in head.lower(), head
    problem = json.JSONDecoder().raw_decode(body.decode())[0]
    assert problem["status"] == status
    assert {"type", "title", "error"} <= problem.keys()


def test_the_pages_of_nginx_itself_are_not_there_for_clients(nginx: Client) -> None:
    for path in ("/nginx/413", "/nginx/", "/nginx/x"):
        answer = nginx.get(path)
        assert (answer.status, answer.json["type"]) == (404, "/problems/not-found")


def test_nginx_compresses_what_is_long_for_clients_that_accept_it(nginx: Client) -> None:
    nginx.put("/api/v1/config/long", {"value": ["the same"] * 2000})
    for path in ("/api/v1/config/long", "/api/v1/config/export.yaml", "/api/v1/events?after=0"):
        plain, small = nginx.get(path), nginx.get(path, headers={"Accept-Encoding": "gzip"})
        assert (plain.headers.get("Content-Encoding"), small.headers["Content-Encoding"]) == (None, "gzip")
        assert gzip.decompress(small.body) == plain.body
        assert len(small.body) < len(plain.body) / 10
    assert "Content-Encoding" not in nginx.get("/health/live", headers={"Accept-Encoding": "gzip"}).headers
    tag = nginx.get("/api/v1/config/long", headers={"Accept-Encoding": "gzip"}).headers["ETag"]
    assert nginx.get("/api/v1/config/long", headers={"If-None-Match": tag}).status == 304
    assert nginx.put("/api/v1/config/long", {"value": 1}, headers={"If-Match": tag}).status == 200


def test_requests_succeed_at_once_when_the_database_is_back(
    start_cluster: Callable[..., Cluster], own_postgres: Postgres
) -> None:
    """With `fail_timeout=30s` and `http_503` in `proxy_next_upstream` nginx answered its own 502 for another 25 s."""
    cluster = start_cluster(2, nginx=True, dsn=own_postgres.dsn(own_postgres.database()))
    nginx = cluster.nginx_client()
    assert nginx.post(LOCKS + "x", {"owner": "me"}).status == 201
    own_postgres.stop()
    until, bodies = time.monotonic() + 3, set()
    while time.monotonic() < until:
        answer = nginx.get(LOCKS + "x")
        bodies.add((answer.status, answer.json["type"], answer.headers.get("Retry-After")))
    assert bodies == {(503, "/problems/unavailable", "1")}
    own_postgres.start()
    cluster.wait_healthy()
    assert [nginx.get(LOCKS + "x").status for _ in range(20)] == [200] * 20


def test_without_any_instance_nginx_answers_a_problem_as_loom_does(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(1, nginx=True)
    nginx = cluster.nginx_client()
    cluster.masters[0].stop(signal.SIGTERM, 30)
    answer = nginx.post(LOCKS + "x", {}, headers={"X-Request-ID": "mine"})
    assert (answer.status, answer.json["type"]) == (502, "/problems/unavailable")
    assert (answer.headers["Retry-After"], answer.headers["X-Request-ID"]) == ("1", "mine")


def test_an_instance_serves_as_soon_as_it_is_back_after_all_were_down(start_cluster: Callable[..., Cluster]) -> None:
    """With `fail_timeout` alone nginx reported "no live upstreams" for up to 2 s more, also after quick restarts."""
    cluster = start_cluster(2, nginx=True)
    for master in cluster.masters:
        master.stop(signal.SIGTERM, 30)
    with Load([cluster.nginx_url], [get("/health/live")] * 2, pause=0.01) as load:
        wait_until(lambda: load.statuses()[502] > 20)
        cluster.start(0)
        back = time.monotonic()
        time.sleep(2)
    assert {call.status for call in load.between(back)} == {200}


def test_nginx_repeats_a_read_at_another_instance_but_not_a_post(start_cluster: Callable[..., Cluster]) -> None:
    cluster = start_cluster(2, nginx=True)
    nginx = cluster.nginx_client()
    cluster.masters[1].stop(signal.SIGTERM, 30)
    with contextlib.closing(DyingServer(cluster.ports[1])) as dying:
        statuses: dict[str, list[int]] = {"GET": [], "POST": []}
        for i in range(8):
            statuses["GET"].append(nginx.get("/health/live").status)
            statuses["POST"].append(nginx.post(LOCKS + str(i), {}).status)
            time.sleep(0.4)  # after three failures within a second nginx would stop using it
    assert statuses["GET"] == [200] * 8
    assert dying.methods["GET"] >= 1
    assert set(statuses["POST"]) == {201, 502}
    assert statuses["POST"].count(502) == dying.methods["POST"]
