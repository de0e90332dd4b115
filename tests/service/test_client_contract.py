"""`loom.client` has every call of the contract and every problem, and imports nothing of the server."""

from __future__ import annotations

import re
import subprocess
import sys

from harness import contract

from loom import errors as server
from loom.client import Client, errors

KINDS = "(Project|Provider|Agent|Bead)"
OF_KINDS = f"list{KINDS}s|create{KINDS}|get{KINDS}|put{KINDS}|patch{KINDS}|delete{KINDS}|get{KINDS}History"
NOT_NEEDED = {"getLiveness", "getReadiness", "getOk"}  # for what starts instances, and the original's clients


def test_every_operation_of_the_contract_is_a_method() -> None:
    operations = {op["operationId"] for item in contract.document()["paths"].values() for op in item.values()}
    snake = {re.sub("(?<!^)(?=[A-Z])", "_", name).lower() for name in operations if not re.fullmatch(OF_KINDS, name)}
    missing = {name for name in snake if not callable(getattr(Client, name, None))}
    assert missing == {re.sub("(?<!^)(?=[A-Z])", "_", name).lower() for name in NOT_NEEDED}


def test_every_problem_that_loom_answers_is_a_class() -> None:
    sent = {"internal" if name == "error" else name for name in server.BY_TYPE}
    assert sent - set(errors.BY_TYPE) == set()


def test_a_program_that_uses_the_client_loads_neither_flask_nor_the_database_driver() -> None:
    code = (
        "import sys, loom.client; print([m for m in ('flask', 'psycopg2', 'gunicorn', 'msgspec') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_without_the_extra_the_other_commands_work_and_these_say_what_to_install() -> None:
    code = "import sys; sys.modules['urllib3'] = None; from loom.cli import main; main(prog_name='loom')"

    def loom(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)

    assert loom("--help").returncode == loom("config", "check").returncode == 0
    refused = loom("lock", "run", "x", "--", "true")
    assert (refused.returncode, "loom[client]" in refused.stderr) == (1, True)
