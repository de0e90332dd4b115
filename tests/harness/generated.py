"""Hooks of schemathesis: generated requests use entities that exist, and do not wait for long. Loaded by its command.

CONTRACT_WORLD names a file with the existing entities, CONTRACT_SEEN one that gets a line for each answer.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis import Case, GenerationMode, HookContext, Response
from schemathesis.core.failures import Failure

WORLD: dict[str, list[Any]] = json.loads(Path(os.environ["CONTRACT_WORLD"]).read_text())
KINDS = {"projects": "project_id", "providers": "provider_id", "agents": "agent_id", "beads": "bead_id"}
LONG = {str(n) for n in range(2, 31)}  # seconds

gc.set_threshold(100_000, 50, 50)  # Python's own settings cost an eighth of the CPU time

chance = random.Random(WORLD["seed"][0])
numbers = itertools.count(1)


@schemathesis.hook
def filter_query(context: HookContext, query: dict[str, Any]) -> bool:
    """An empty object or list vanishes in a URL, so that a request meant to be invalid is valid."""
    return not any(value in ({}, []) for value in (query or {}).values())


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:
    """gunicorn refuses a request line beyond 8,190 bytes before the application sees it."""
    return response.status_code != 414


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    for part in (case.query, case.body):
        if isinstance(part, dict) and str(part.get("wait_seconds")) in LONG:
            part["wait_seconds"] = 0
    if (case.headers or {}).get("Idempotency-Key", "").isalnum():  # otherwise one would be the retry of another
        case.headers["Idempotency-Key"] = f"key-{os.getpid()}-{next(numbers)}"
    if case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE:
        _reach(case)


@schemathesis.hook
def after_call(context: HookContext, case: Case, response: Response) -> None:
    with open(os.environ["CONTRACT_SEEN"], "a") as seen:
        seen.write(f"{case.method} {case.path} {response.status_code}\n")


def _reach(case: Case) -> None:
    """Replace most ids and tokens of a valid request by ones that exist."""
    parts = case.path.split("/")
    named = case.path_parameters or {}
    doomed = case.method == "DELETE" and parts[-1] == "{id}"
    if "id" in named and parts[3] in KINDS:
        named["id"] = chance.choice(WORLD["doomed" if doomed else KINDS[parts[3]]])
    for part in (named, case.query, case.body):
        if not isinstance(part, dict):
            continue
        for name in part.keys() & WORLD.keys():
            if chance.random() < (
                0.3 if (case.method, name) == ("POST", "name") else 0.9
            ):  # so that new locks are acquired, too
                part[name] = chance.choice(WORLD[name])
        for name in part.keys() & {"blocked_by", "blocks", "children", "related_to"}:
            part[name] = chance.sample(WORLD["bead_id"], 2)
    if doomed or chance.random() < 0.8:
        for header in ("If-Match", "If-None-Match", "Loom-Lock-Token"):
            (case.headers or {}).pop(header, None)
    if "path" in named:
        file = chance.choice(WORLD["files"])
        for part in (named, case.query):
            part.update({name: file[name] for name in part.keys() & file.keys()})
    held = WORLD["claims"] if "claim" in case.path or parts[-1] in ("complete", "fail") else WORLD["locks"]
    holder, token = chance.choice(held)
    for part in (case.query, case.body):
        if isinstance(part, dict) and "fencing_token" in part and chance.random() < 0.9:
            part["fencing_token"] = token
            named.update(dict.fromkeys(named.keys() & {"id", "name"}, holder))
