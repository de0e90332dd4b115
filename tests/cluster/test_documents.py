"""What README.md and docs/ show works: each command runs as it is written, and prints what is shown under it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2.extensions
import pytest
import yaml
from harness import Cluster, Postgres, documents, program
from harness.cluster import ROOT
from harness.documents import Block
from harness.postgres import SUPERUSER

from loom import config, errors

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PORTS = (8080, 8081, 8082)
NGINX_PORT = 8000


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def found(document: Path) -> list[Block]:
    return documents.blocks(document.read_text())


WITH_COMMANDS = [document for document in DOCUMENTS if any(block.runs for block in found(document))]


@pytest.fixture
def loom_database(postgres: Postgres) -> Iterator[str]:
    """The DSN of a new database that is called loom, as in the documents."""
    postgres.query(f"ALTER DATABASE {postgres.database()} RENAME TO loom")
    yield postgres.dsn("loom")
    postgres.drop("loom")
    postgres.query("ALTER SYSTEM RESET ALL")  # the documents tune the server, which other tests share
    postgres.query("SELECT pg_reload_conf()")


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=name)
def test_each_command_works_as_it_is_written(
    document: Path,
    loom_database: str,
    start_cluster: Callable[..., Cluster],
    tmp_path: Path,
) -> None:
    program("curl", "curl")
    pairs = documents.with_outputs(found(document))
    nginx = any(f":{NGINX_PORT}/" in block.text for block, _ in pairs)
    if nginx:
        program("nginx", "nginx")  # else skips
    count = max(number for number, port in enumerate(PORTS, 1) if number == 1 or str(port) in document.read_text())
    cluster = start_cluster(count, dsn=loom_database, nginx=nginx)
    cluster.wait_healthy()
    ports = dict(zip(PORTS, cluster.ports, strict=False))
    if nginx:
        ports[NGINX_PORT] = int(cluster.nginx_url.rpartition(":")[2])
    server = psycopg2.extensions.parse_dsn(loom_database)
    env = {"DATABASE_DSN": loom_database, "PGHOST": server["host"], "PGPORT": server["port"], "PGUSER": SUPERUSER}
    for ran in documents.run(pairs, tmp_path, env, ports):
        if fault := ran.fault:
            pytest.fail(f"{name(document)}:{ran.block.line} {fault}. It prints:\n{ran.printed}", pytrace=False)


@pytest.mark.parametrize("document", [*DOCUMENTS, CONTRIBUTING], ids=name)
def test_a_block_that_does_not_run_here_names_a_test_that_exists(document: Path) -> None:
    missing = [test for block in found(document) for test in block.tests if not documents.is_test(test)]
    assert missing == []


@pytest.mark.parametrize("document", [*DOCUMENTS, CONTRIBUTING], ids=name)
def test_every_command_is_in_a_block_that_these_tests_know(document: Path) -> None:
    assert documents.unclear(document.read_text()) == []


@pytest.mark.parametrize("document", [*DOCUMENTS, CONTRIBUTING], ids=name)
def test_each_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", [*DOCUMENTS, CONTRIBUTING], ids=name)
def test_each_named_file_exists(document: Path) -> None:
    named = re.findall(r"`((?:loom|tests|nginx|systemd|bench)/[\w./@-]+\.\w+)`", document.read_text())
    assert [file for file in named if not (ROOT / file).is_file()] == []


def test_each_configuration_of_loom_in_the_documents_is_valid(tmp_path: Path) -> None:
    shown = [block for document in DOCUMENTS for block in found(document) if block.language == "yaml"]
    settings = [block.text for block in shown if yaml.safe_load(block.text).keys() <= config.SECTIONS]
    assert len(settings) >= 2
    for text in settings:
        (tmp_path / "config.yaml").write_text(text)
        config.load(str(tmp_path / "config.yaml"), {"DATABASE_DSN": "host=h"})


def test_each_make_command_is_a_target_of_the_makefile(tmp_path: Path) -> None:
    """The targets take long, so `make --dry-run` only prints what each would run."""
    shown = [block for document in [*DOCUMENTS, CONTRIBUTING] for block in found(document) if block.language == "sh"]
    commands = [line for block in shown for line in block.text.splitlines() if line.startswith("make ")]
    assert len(commands) > 5
    documents.checkout(tmp_path)
    for command in commands:
        subprocess.run(command.replace("make", "make --dry-run", 1), shell=True, cwd=tmp_path, check=True)


def test_each_event_in_the_log_is_explained() -> None:
    source = "".join(file.read_text() for file in (ROOT / "loom").rglob("*.py"))
    logged = set(re.findall(r"(?:\blog\.\w+\(\s*|log_as=)\"([a-z-]+)\"", source))
    explained = set(re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE))
    assert len(logged) > 10
    assert explained == logged


def test_each_problem_is_explained() -> None:
    def types(problem: type[errors.Error]) -> set[str]:
        return {problem.type}.union(*map(types, problem.__subclasses__()))

    table = re.findall(r"^\| \d{3} \| (.*?) \|", (ROOT / "docs/api/README.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`([a-z-]+)`", " ".join(table))) == types(errors.Error)


def anchors(document: Path) -> set[str]:
    """The headings of a document as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ('{"a": 1}', '{"a":1}\n'),
        ('{"id": "<id>", "b": 2}', '{"id":"x-1","b":2}'),
        ('{"token": <token>, …}', '{"token":17,"c":[1,2]}'),
        ('{"a": 1, …}', '{"a":1}'),
        ('{"a": 1, …, "c": 3}', '{"a":1,"c":3}'),
        ("…", ""),
    ],
)
def test_a_placeholder_matches_values_that_differ(shown: str, printed: str) -> None:
    assert documents.matches(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ('{"a": 1}', '{"a":2}'),
        ('{"a": 1}', '{"a":1,"b":2}'),
        ('{"id": "<id>"}', '{"id":"x-1","b":"2"}'),
        ('{"id": <id>, …}', '{"uid":17,"c":[1,2]}'),
        ('{"a": 1, …}', '{"a":12}'),
        ("[]", ""),
    ],
)
def test_a_wrong_output_is_detected(shown: str, printed: str) -> None:
    assert not documents.matches(shown, printed)


@pytest.mark.parametrize(
    "text",
    [
        "Do this:\n\n    loom migrate\n",
        "```bash\nloom migrate\n```\n",
        "```text\nloom migrate\n```\n",
        "```output\nschema version 1\n```\n",
    ],
)
def test_a_command_in_a_block_that_does_not_run_is_detected(text: str) -> None:
    assert documents.unclear(text) != []
