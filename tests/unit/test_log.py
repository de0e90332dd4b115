"""The log is machine-readable: one line for each event, whatever it contains, and no password."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from harness import MARGIN, program

from loom import log
from loom.config import ConfigError, LoggingConfig, SyslogConfig
from loom.syslog import LOOK_UP_SECONDS

logger = logging.getLogger("loom.test")


@pytest.fixture(autouse=True)
def _restore_root_logger():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def lines(tmp_path):
    """Configure the log with `settings`, and return the function that reads its lines."""

    def start(**settings):
        log.setup(LoggingConfig(output=str(tmp_path / "log"), **settings))
        return lambda: (tmp_path / "log").read_text().splitlines()

    return start


def test_a_json_line_has_time_level_event_and_fields(lines):
    read = lines()
    logger.warning(
        "lock-lost", extra={"fields": {"lock_name": "build\n", "fencing_token": 17, "why": None, "level": "no"}}
    )
    line = json.loads(read()[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "warning",
        "event": "lock-lost",
        "pid": os.getpid(),
        "lock_name": "build\n",
        "fencing_token": 17,
        "why": None,
    }


def test_a_text_line_is_the_event_followed_by_its_fields(lines):
    read = lines(format="text")
    logger.info("instance registered", extra={"fields": {"host": "a b", "port": 8080, "note": ""}})
    assert read()[0].endswith(f' info instance registered pid={os.getpid()} host="a b" port=8080 note=""')


@pytest.mark.parametrize("style", ["json", "text"])
def test_any_event_is_one_line_even_with_an_exception(lines, style):
    read = lines(format=style)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("failed\r\nbadly \u2028 \udcff ü", extra={"fields": {"what": {"a": [b"\n", {1, 2}]}}})
    (line,) = read()
    assert line.isascii()
    assert "Traceback" in line
    assert "ValueError: two" in line


@pytest.mark.parametrize("style", ["json", "text"])
def test_no_line_shows_a_password(lines, style):
    read = lines(format=style)
    dsn = "postgresql://user:hunter22@host/db?sslmode=require"
    logger.info("connecting to %s", dsn)
    logger.info("pool", extra={"fields": {"dsn": dsn, "more": [{"conninfo": "host=h password='hunter22 x'"}]}})
    logger.info("pool", extra={"fields": {"password": "hunter22", "PGPASSWORD": "hunter22"}})
    try:
        raise RuntimeError(f"refused: {dsn}")
    except RuntimeError:
        logger.exception("pool")
    text = "\n".join(read())
    assert len(read()) == 4
    assert "hunter22" not in text
    assert "host" in text


def test_the_level_changes_at_run_time(lines):
    read = lines(level="warning")
    logger.info("unseen")
    log.set_level("debug")
    logger.debug("seen")
    assert [json.loads(line)["event"] for line in read()] == ["seen"]


def test_a_rotated_file_is_reopened(lines, tmp_path):
    read = lines()
    logger.info("before")
    (tmp_path / "log").rename(tmp_path / "log.1")
    logger.info("after")
    assert [json.loads(line)["event"] for line in read()] == ["after"]


def test_a_file_that_cannot_be_opened_is_reported_on_one_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        log.setup(LoggingConfig(output=str(tmp_path / "missing" / "log")))
    assert str(caught.value).startswith(f"logging.output: {tmp_path}/missing/log: [Errno 2]")


def test_gunicorns_lines_have_the_same_format_and_requests_are_not_logged(tmp_path):
    output = tmp_path / "log"
    (tmp_path / "gunicorn.conf.py").write_text(
        "from loom.config import LoggingConfig\nfrom loom.log import dict_config\n"
        f"logconfig_dict = dict_config(LoggingConfig(output={str(output)!r}))\n"
        f"bind = 'unix:{tmp_path}/socket'\ncontrol_socket_disable = True\n"
        "def when_ready(server):\n    server.log.access_log.info('GET /')\n    server.halt()\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "gunicorn", "none:none"], cwd=tmp_path, capture_output=True, timeout=30, check=False
    )
    events = [json.loads(line)["event"] for line in output.read_text().splitlines()]
    assert events[0].startswith("Starting gunicorn")
    assert "GET /" not in events
    assert run.stderr == b""


def syslog(port: int, host: str = "127.0.0.1") -> SyslogConfig:
    return SyslogConfig(enabled=True, address=f"{host}:{port}")


@pytest.fixture
def server():
    """A syslog server."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(5)
        yield sock


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_syslog_server_gets_each_line_also_from_a_forked_process(lines, server, host):
    lines(syslog=syslog(server.getsockname()[1], host))
    logger.error("from-parent", extra={"fields": {"lock_name": "ü"}})
    received = server.recv(65536).decode()
    head, _, body = received.partition(" - - ")
    assert re.fullmatch(
        rf"<27>1 \d{{4}}-\d\d-\d\dT[\d:.]+\+00:00 {re.escape(socket.gethostname())} loom {os.getpid()}", head
    )
    assert json.loads(body)["lock_name"] == "ü"
    child = os.fork()
    if child == 0:
        logger.info("from-child")
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(server.recv(65536).decode().partition(" - - ")[2])["event"] == "from-child"


def test_syslog_needs_no_thread(lines, server):
    """A module that a thread of the gunicorn master imports during a fork stays broken in the worker."""
    before = threading.enumerate()
    lines(syslog=syslog(server.getsockname()[1], "localhost"))
    logger.error("line")
    assert server.recv(65536)
    assert threading.enumerate() == before


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1", "x" * 300, "[::1]"])
def test_an_unreachable_syslog_server_does_not_slow_down_logging(lines, host):
    read = lines(syslog=syslog(9, host))
    start = time.monotonic()
    for number in range(2000):
        logger.info("line", extra={"fields": {"number": number}})
    assert time.monotonic() - start < 1.5 + MARGIN
    assert [json.loads(line)["event"] for line in read()].count("line") == 2000


def test_an_unknown_syslog_host_is_logged_once(lines):
    read = lines(syslog=syslog(9, "no-such-host.invalid"))
    logger.info("line")
    logger.info("line")
    said, *others = map(json.loads, read())
    assert (said["event"], said["address"]) == ("syslog-unreachable", "no-such-host.invalid:9")
    assert "Name or service not known" in said["reason"] or "failure in name resolution" in said["reason"]
    assert [line["event"] for line in others] == ["line", "line"]


def test_a_failure_to_send_to_syslog_is_logged_once(lines, server):
    read = lines(syslog=syslog(server.getsockname()[1]))
    for _ in range(2):
        logger.info("long", extra={"fields": {"text": "x" * 100_000}})  # more than a datagram takes
    said = [json.loads(line) for line in read()]
    assert sorted(line["event"] for line in said) == ["long", "long", "syslog-unreachable"]
    assert "Message too long" in next(line["reason"] for line in said if line["event"] == "syslog-unreachable")
    logger.info("short")
    assert b"syslog-unreachable" in server.recv(65536)
    assert b"short" in server.recv(65536)


def in_own_network(code: str, *files: tuple[Path, str]) -> dict[str, Any]:
    """Run Python in a network of its own, with `files` mounted over the machine's; return the JSON that it prints."""
    mounts = "".join(f"mount --bind {ours} {theirs} && " for ours, theirs in files)
    script = f"ip link set lo up && {mounts} exec {sys.executable} -c {shlex.quote(code)}"
    command = [program("unshare", "util-linux"), "--net", "--mount", "sh", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if os.geteuid() != 0 and run.returncode:
        pytest.skip("needs root")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


SETUP = """
import json, logging, os, socket, threading, time
from loom import log
from loom.config import LoggingConfig, SyslogConfig
def setup(address):
    log.setup(LoggingConfig(output="/dev/null", syslog=SyslogConfig(enabled=True, address=address)))
"""


def test_a_silent_name_server_delays_a_start_by_two_seconds_at_most(tmp_path):
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1")
    said = in_own_network(
        SETUP
        + """
names = socket.socket(type=socket.SOCK_DGRAM)
names.bind(("127.0.0.1", 53))  # never answers
start = time.monotonic()
setup("logs.example.com:514")
took = time.monotonic() - start
log.start_threads()
start = time.monotonic()
for _ in range(100):
    logging.getLogger("x").info("line")
print(json.dumps({"asked": len(names.recv(1000)), "took": took, "lines": time.monotonic() - start}))
""",
        (tmp_path / "resolv.conf", "/etc/resolv.conf"),
    )
    assert said["asked"] > 0
    assert LOOK_UP_SECONDS <= said["took"] < LOOK_UP_SECONDS + MARGIN
    assert said["lines"] < MARGIN


def test_a_worker_finds_a_syslog_server_whose_name_resolves_only_later(tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    said = in_own_network(
        SETUP
        + """
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("127.0.0.9", 5140))
server.settimeout(0.1)
setup("logs.example.com:5140")
log.start_threads()
open("/etc/hosts", "a").write("127.0.0.9 logs.example.com\\n")
deadline = time.monotonic() + 20
got = b""
while not got and time.monotonic() < deadline:
    logging.getLogger("x").info("line")
    try:
        got = server.recv(1000)
    except TimeoutError:
        pass
print(json.dumps({"got": got.decode()}))
""",
        (tmp_path / "hosts", "/etc/hosts"),
    )
    assert '"event":"line"' in said["got"]


def test_a_line_that_cannot_be_formatted_does_not_raise_in_its_caller(lines, capsys):
    lines(syslog=syslog(9))
    logger.info("%d", "text")
    assert "Logging error" in capsys.readouterr().err


@pytest.fixture
def unread(tmp_path):
    """A named pipe that is open, and from which nobody reads until the test does: its path, and what reads it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def read() -> list[dict[str, Any]]:
        text = b""
        while select.select([reader], [], [], 0.5)[0]:
            text += os.read(reader, 1 << 20)
        return [json.loads(line) for line in text.splitlines()]

    yield str(path), read
    os.close(reader)


def test_nobody_waits_for_a_log_that_nobody_reads_and_the_lost_lines_are_counted(unread):
    path, read = unread
    log.setup(LoggingConfig(output=path))
    log.start_threads()
    sent = 10_000
    start = time.monotonic()
    for number in range(sent):
        logger.info("line", extra={"fields": {"number": number, "text": "x" * 100}})
    assert time.monotonic() - start < MARGIN
    dropped = log.usage()["output"]["dropped"]
    assert 0 < dropped < sent
    lines = read()
    numbers = [line["number"] for line in lines if line["event"] == "line"]
    assert numbers == sorted(numbers)
    (told,) = [line for line in lines if line["event"] == "log-lines-dropped"]
    assert (told["target"], told["count"], dropped) == ("output", dropped, sent - len(numbers))
    logger.info("again")
    assert [line["event"] for line in read()] == ["again"]


STUCK_STDOUT = """
import json, logging, sys, time
from loom import log
from loom.config import LoggingConfig
log.setup(LoggingConfig())
if sys.argv[1] == "threads":
    log.start_threads()
start = time.monotonic()
for number in range(int(sys.argv[2])):
    logging.getLogger("x").info("x" * 1000)
print(json.dumps([time.monotonic() - start, log.usage()["output"]["dropped"]]), file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize(("mode", "lines", "most"), [("threads", 10_000, 0.0), ("master", 70, 1.0)])
def test_a_process_ends_although_nobody_reads_its_stdout(mode, lines, most):
    """`most`: seconds for which the loop may take; a master has no thread and waits a little for each line."""
    command = [sys.executable, "-c", STUCK_STDOUT, mode, str(lines)]
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        took, dropped = json.loads(process.stderr.read())
        assert process.wait(10) == 0
        assert time.monotonic() - start < 5 + MARGIN
        assert took < most + MARGIN
        assert dropped > 0
        lines_read = process.stdout.read().splitlines()
        assert len(lines_read) + dropped <= lines + 1
        assert all(json.loads(line) for line in lines_read)


def test_a_log_whose_folder_is_removed_stops_nobody_and_goes_on_when_it_is_back(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    log.setup(LoggingConfig(output=str(folder / "log")))
    logger.info("before")
    (folder / "log").unlink()
    folder.rmdir()
    logger.info("lost")
    logger.info("lost too")
    folder.mkdir()
    logger.info("after")
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["after", "log-lines-dropped"]
    assert lines[1]["count"] == 2


def test_a_process_that_ends_has_written_its_last_lines(tmp_path):
    code = "import logging, sys; from loom import log; from loom.config import LoggingConfig\n"
    code += "log.setup(LoggingConfig(output=sys.argv[1])); log.start_threads(); log.log.info('last')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], check=True, timeout=30)
    assert json.loads((tmp_path / "log").read_text())["event"] == "last"


def test_a_critical_line_is_written_before_the_process_ends_at_once(tmp_path):
    code = "import logging, os, sys; from loom import log; from loom.config import LoggingConfig\n"
    code += "log.setup(LoggingConfig(output=sys.argv[1])); log.start_threads(); log.log.critical('last'); os._exit(3)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], check=False, timeout=30)
    assert json.loads((tmp_path / "log").read_text())["event"] == "last"
