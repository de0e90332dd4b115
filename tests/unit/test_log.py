"""A log that a machine can read: one line an event, whatever is in it, and no password."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from loom import log
from loom.config import ConfigError, LoggingConfig, SyslogConfig

logger = logging.getLogger("loom.test")


@pytest.fixture(autouse=True)
def _root_as_it_was():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def lines(tmp_path):
    """Set the log up as asked, and return the function that reads its lines."""

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


def test_a_text_line_reads_as_a_sentence_with_fields(lines):
    read = lines(format="text")
    logger.info("instance registered", extra={"fields": {"host": "a b", "port": 8080, "note": ""}})
    assert read()[0].endswith(f' info instance registered pid={os.getpid()} host="a b" port=8080 note=""')


@pytest.mark.parametrize("style", ["json", "text"])
def test_an_exception_and_any_text_are_one_line_each(lines, style):
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
def test_a_password_reaches_no_line(lines, style):
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


def test_a_file_that_was_rotated_is_opened_anew(lines, tmp_path):
    read = lines()
    logger.info("before")
    (tmp_path / "log").rename(tmp_path / "log.1")
    logger.info("after")
    assert [json.loads(line)["event"] for line in read()] == ["after"]


def test_a_file_that_cannot_be_opened_is_told_in_one_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        log.setup(LoggingConfig(output=str(tmp_path / "missing" / "log")))
    assert str(caught.value).startswith(f"logging.output: {tmp_path}/missing/log: [Errno 2]")


def test_gunicorn_s_own_lines_look_the_same_and_requests_leave_none(tmp_path):
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


def test_a_syslog_server_gets_each_line_also_from_a_forked_process(lines):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        lines(syslog=syslog(server.getsockname()[1]))
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
            logging.getLogger().handlers[1].flush()
            os._exit(0)
        os.waitpid(child, 0)
        assert json.loads(server.recv(65536).decode().partition(" - - ")[2])["event"] == "from-child"


@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1", "x" * 300, "[::1]"])
def test_a_syslog_server_that_is_away_costs_no_time(lines, host, monkeypatch):
    real = socket.getaddrinfo

    def slow(*args, **kwargs):
        time.sleep(2)
        return real(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    read = lines(syslog=syslog(9, host))
    start = time.monotonic()
    for number in range(2000):
        logger.info("line", extra={"fields": {"number": number}})
    assert time.monotonic() - start < 1.5
    assert len(read()) == 2000


def test_a_line_that_cannot_be_made_does_not_stop_its_writer(lines, capsys):
    lines(syslog=syslog(9))
    logger.info("%d", "text")
    assert "Logging error" in capsys.readouterr().err
