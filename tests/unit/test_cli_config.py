"""The `loom` command prints each setting and each fault on one line, and never a password."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from test_config import PASSWORDS, broken_dsns_of, dsns_of, traces

from loom import __version__
from loom.cli import main


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("PORT", "DATABASE_TYPE", "DATABASE_DSN", "LOOM_CONFIG"):
        monkeypatch.delenv(variable, raising=False)


def loom(*words: str, **variables: str):
    return CliRunner().invoke(main, words, env=variables)


def serve(**variables: str):
    """Run `loom serve` with settings that end it at once; in its own process, since it becomes gunicorn."""
    command = [sys.executable, "-c", "from loom.cli import main; main()", "serve"]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=30, check=False
    )


def test_check_prints_every_value_as_yaml_with_its_source():
    Path("config.yaml").write_text("logging:\n  format: text\n  syslog: {enabled: true}\n")
    result = loom("config", "check", PORT="8081", DATABASE_DSN="postgresql://u:hunter22@h/db?pool_max_conns=3")
    assert result.exit_code == 0
    values = yaml.safe_load(result.output)
    assert values["logging"]["syslog"] == {"enabled": True, "address": "localhost:514"}
    assert values["database"]["dsn"] == "user=u password=*** dbname=db host=h"
    lines = {tuple(line.split()[:2]): line.partition("# ")[2] for line in result.output.splitlines()}
    assert lines["http_port:", "8081"] == "environment PORT"
    assert lines["format:", '"text"'] == "config.yaml:2"
    assert lines["enabled:", "true"] == "config.yaml:3"
    assert lines["pool_max:", "3"] == "environment DATABASE_DSN, pool_max_conns"
    assert lines["threads:", "8"] == "default"


@pytest.mark.parametrize("password", PASSWORDS)
def test_no_password_is_printed(password):
    for dsn in dsns_of(password) + broken_dsns_of(password):
        result = loom("config", "check", DATABASE_DSN=dsn)
        assert not [trace for trace in traces(password) if trace in result.output], result.output


FAULT = "Error: environment PORT: server.http_port: expected a port from 1 to 65535, got 'eighty'\n"


@pytest.mark.parametrize("command", [("config", "check"), ("migrate",)])
def test_a_fault_is_reported_on_one_line_of_stderr_with_exit_status_1(command):
    result = loom(*command, PORT="eighty")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", FAULT)


def test_serve_reports_a_fault_on_one_line():
    result = serve(PORT="eighty")
    assert (result.returncode, result.stdout, result.stderr) == (1, "", FAULT)


def test_an_unreachable_database_is_reported_on_one_line_without_its_password():
    result = loom("migrate", DATABASE_DSN="postgresql://u:hunter22@127.0.0.1:9/db")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "hunter22" not in result.output


def test_a_log_file_that_cannot_be_opened_is_reported_on_one_line():
    Path("config.yaml").write_text("logging: {output: missing/log}")
    result = serve(DATABASE_DSN="host=h")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "logging.output: missing/log: " in result.stderr


def test_serve_starts_gunicorn_with_our_settings_whatever_files_are_in_the_folder(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append(arguments))
    result = loom("serve", DATABASE_DSN="host=h dbname=db")
    assert result.exit_code == 0, result.output
    ((program, words),) = started
    assert program == sys.executable
    assert words[1:4] == ["-m", "gunicorn", "-c"]
    assert words[4].endswith("gunicorn.conf.py")
    assert words[5] == "loom.routes:create_app()"


def test_a_command_is_imported_only_when_called():
    code = "import sys, loom.cli as cli; cli.main(['--version'], standalone_mode=False); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert __version__ in run.stdout
    assert "loom.cli" in run.stdout
    assert not {"loom.cli.serve", "loom.cluster", "loom.db", "flask", "gunicorn"} & set(run.stdout.split())


def test_help_lists_the_commands_and_an_unknown_one_is_refused():
    result = loom("--help")
    assert {"config", "migrate", "serve"} <= {line.split()[0] for line in result.output.splitlines() if line.strip()}
    assert loom("srve").exit_code == 2
