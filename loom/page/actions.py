"""What an operator does here. Each action is asked for again, on a page of its own, and needs a reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from flask import Blueprint, Response

from loom import db, errors, instances, locks
from loom.http import headers, parse
from loom.http.pollers import pollers
from loom.page.render import HEADERS, NO_STORE, link, parameter, show
from loom.state import claims, entities
from loom.state.beads import Bead
from loom.state.entities import Conditions

bp = Blueprint("page_actions", __name__)
log = logging.getLogger("loom.page")

ACTOR = "operator"
MOST = 500  # characters of a reason
Form = dict[str, str]


class Action(NamedTuple):
    """`target`: the field that names what it is done to; `also`: the field that tells which state of it is meant."""

    title: str
    button: str
    warning: str
    target: str
    also: str | None
    page: str
    do: Callable[[db.Connection, Form, str], Any]


def _release_lock(conn: db.Connection, form: Form, reason: str) -> None:
    name = form["name"]
    locks.force_release(conn, name, _number(form, "token"), reason)
    pollers().locks.poll_soon(lambda waiter: waiter.name == name)


def _give_back(conn: db.Connection, form: Form, reason: str) -> None:
    claims.end(conn, _writer(form), form["id"], _number(form, "token"), "released", reason)


def _unblock(conn: db.Connection, form: Form, reason: str) -> None:
    claims.redispatch(conn, _writer(form), form["id"], reason, Conditions([_number(form, "version")]))


def _drain(conn: db.Connection, form: Form, reason: str) -> None:
    instances.order(conn, form["id"], "draining", reason)


def _activate(conn: db.Connection, form: Form, reason: str) -> None:
    instances.order(conn, form["id"], "active", reason)


ACTIONS = {
    "release-lock": Action(
        "Force-release a lock",
        "Release the lock",
        "Its holder loses it at once: what it does from now on under this token is refused, and the next in the queue"
        " gets the lock. If the holder is alive and works on something outside Loom, two may now work on it.",
        *("name", "token", "/lock", _release_lock),
    ),
    "give-back-bead": Action(
        "Give a bead back",
        "Give the bead back",
        "Its agent loses the claim: its late answer is refused. The bead is open again; this try does not count.",
        *("id", "token", "/bead", _give_back),
    ),
    "unblock-bead": Action(
        "Unblock a bead",
        "Unblock the bead",
        "The bead is open again, its attempts and failures count from 0, and the next agent that fits gets it.",
        *("id", "version", "/bead", _unblock),
    ),
    "drain-instance": Action(
        "Drain an instance",
        "Drain the instance",
        "Within 6 s it reports that it is not ready, lets no request wait, and leaves the upkeep to others. It serves"
        " what still arrives: nginx does not ask whether it is ready. The order ends with its process.",
        *("id", None, "/instance", _drain),
    ),
    "activate-instance": Action(
        "End the draining of an instance",
        "Make the instance active",
        "Within 6 s it reports that it is ready again.",
        *("id", None, "/instance", _activate),
    ),
}


@bp.get("/actions/<action>")
def confirm(action: str) -> Response:
    chosen = _action(action)
    form = {name: parameter(name) for name in (chosen.target, chosen.also) if name}
    return _ask(action, form)


@bp.post("/actions/<action>")
def act(action: str) -> Response:
    chosen, form = _action(action), _form()
    given = {name: form.get(name, "") for name in (chosen.target, chosen.also) if name}
    reason = " ".join(form.get("reason", "").split())
    if not reason or len(reason) > MOST:
        return _ask(action, given, f"Say why, in at most {MOST} characters.", 400)
    parse.plain(reason, "reason", most=MOST)
    with db.connection() as conn:
        chosen.do(conn, given, reason)
    log.warning("operator-action", extra={"fields": {"action": action, **given, "reason": reason}})
    where = link(chosen.page, **{chosen.target: given[chosen.target], "done": action})
    return Response(status=303, headers={**HEADERS, **NO_STORE, "Location": where})


def _ask(action: str, form: Form, problem: str | None = None, status: int = 200) -> Response:
    """The page that asks for the reason. It shows what the action is about as it is now."""
    chosen = ACTIONS[action]
    with db.connection() as conn:
        now: Any
        if chosen.page == "/lock":
            now = locks.get(conn, form["name"])
        elif chosen.page == "/bead":
            now = entities.get(conn, Bead, form["id"])
        else:
            now = instances.get(conn, form["id"])
        return show(
            conn,
            "action.html",
            status=status,
            action=action,
            chosen=chosen,
            form=form,
            now_is=now,
            problem=problem,
            most=MOST,
            back=link(chosen.page, **{chosen.target: form[chosen.target]}),
        )


def _action(name: str) -> Action:
    if name not in ACTIONS:
        raise errors.NotFound("There is no such action.")
    return ACTIONS[name]


def _form() -> Form:
    """The fields of a form. Raises Invalid."""
    try:
        pairs = parse_qsl(parse.raw().decode(errors="replace"), keep_blank_values=True, max_num_fields=10)
    except ValueError:
        raise errors.Invalid("The body is not one of this page's forms.") from None
    return {name: value.replace("\0", "\ufffd") for name, value in pairs}


def _number(form: Form, name: str) -> int:
    text = form[name]
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:20]) <= parse.MAX_TOKEN:
        raise errors.Invalid.field(name, "must be a number")
    return int(text)


def _writer(form: Form) -> Any:
    return headers.writer(f"bead:{form['id']}", ACTOR)
