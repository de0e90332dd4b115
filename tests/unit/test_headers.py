"""The headers of a request say who makes a write and which locks fence it."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask

from loom import errors
from loom.config import Config
from loom.http import headers
from loom.http.auth import CALLER, LOCAL, Caller
from loom.http.permissions import AGENT
from loom.state.writer import Writer

CONFIG = Config()


def writer(actor: str | None = None, caller: Caller = LOCAL, **sent: str) -> Writer:
    names = {CALLER: caller} | {
        f"HTTP_{name.upper()}": value.encode().decode("latin-1") for name, value in sent.items()
    }
    with application().test_request_context(environ_overrides=names):
        return headers.writer("bead:bd-1", actor)


def application() -> Flask:
    app = Flask("test")
    app.config["LOOM"] = CONFIG
    return app


def test_headers_name_the_actor_and_the_request_id() -> None:
    assert writer() == Writer(CONFIG, principal="local")
    assert writer("a 1").actor == "a 1"
    assert writer("a 1", loom_actor="Jürgen (ops)", x_request_id="r-1") == Writer(
        CONFIG, "Jürgen (ops)", None, "r-1", principal="local"
    )
    assert writer(loom_proxy_request_id="n-1") == Writer(CONFIG, proxy_request_id="n-1", principal="local")


def test_only_administrators_name_another_actor_and_nobody_loom_itself() -> None:
    agent = Caller("agent-7", AGENT, True)
    assert writer("a 1", agent) == Writer(CONFIG, "a 1", principal="agent-7", restricted=True)
    with pytest.raises(errors.Forbidden):
        writer(None, agent, loom_actor="ann")
    for name in ("system:upkeep", "sql:loom"):
        with pytest.raises(errors.Forbidden):
            writer(name)
        with pytest.raises(errors.Forbidden):
            writer(loom_actor=name)


def test_a_request_id_that_nginx_would_replace_is_ignored() -> None:
    for bad in ("", "a b", "x" * 129, "ü"):
        assert writer(x_request_id=bad, loom_proxy_request_id=bad) == Writer(CONFIG, principal="local")


@pytest.mark.parametrize(
    ("header", "fences"),
    [
        ("17", {"bead:bd-1": 17}),
        (' 17 ; lock = "a%20%22b%2Cc%22/%C3%BC" ', {'a "b,c"/ü': 17}),
        ('17,18; lock="x,y",17', {"bead:bd-1": 17, "x,y": 18}),
        (f'{2**53 - 1}; lock="ü"', {"ü": 2**53 - 1}),
    ],
)
def test_a_write_is_fenced_by_every_lock_whose_token_it_presents(header: str, fences: dict[str, int]) -> None:
    assert writer(loom_lock_token=header).fences == fences


BAD_TOKENS = ["", "0", "-1", "x", "1,", ",1", "1;", "1 2", "1,2", "1; lock=a", '1; lock=""', str(2**53), "9" * 17]
BAD_NAMES = ["%FF", "%00", "a//b", "x" * 256, 'a"; x="b']


@pytest.mark.parametrize(
    "headers",
    [{"loom_lock_token": bad} for bad in BAD_TOKENS]
    + [{"loom_lock_token": f'1; lock="{bad}"'} for bad in BAD_NAMES]
    + [{"loom_actor": bad} for bad in ("", "a\x00", "a\nb", "x" * 256)],
)
def test_a_bad_header_is_refused_by_name_and_never_ignored(headers: dict[str, Any]) -> None:
    with pytest.raises(errors.Invalid) as caught:
        writer(**headers)
    (problem,) = caught.value.members["errors"]
    assert problem["field"].lower().replace("-", "_") in headers


def test_a_header_in_broken_utf8_is_refused() -> None:
    with (
        application().test_request_context(environ_overrides={"HTTP_LOOM_ACTOR": "\xff"}),
        pytest.raises(errors.Invalid, match="Loom-Actor: is not UTF-8"),
    ):
        headers.writer("bead:bd-1")
