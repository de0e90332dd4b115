"""Log lines: one event a line, JSON or text, with fields. A password never gets into one.

`logger.warning("lock-lost", extra={"fields": {"lock_name": name}})`
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.config
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from loom.config import ConfigError, LoggingConfig
from loom.dsn import mask

FACILITY_DAEMON = 3 << 3


def setup(config: LoggingConfig) -> None:
    """Send the root logger's lines where `config` says. Raises ConfigError when the file can't be opened."""
    try:
        logging.config.dictConfig(dict_config(config))
    except ValueError as exc:
        raise ConfigError(f"logging.output: {config.output}: {exc.__cause__ or exc}") from None


def set_level(level: str) -> None:
    """Change the level (debug, info, warning, error) of this process from now on."""
    logging.getLogger().setLevel(level.upper())


def dict_config(config: LoggingConfig) -> dict[str, Any]:
    """Return what logging.config.dictConfig takes, for our loggers and gunicorn's; no line per request."""
    handler: dict[str, Any] = {"class": "logging.StreamHandler", "stream": f"ext://sys.{config.output}"}
    if config.output not in ("stdout", "stderr"):
        handler = {"class": "logging.handlers.WatchedFileHandler", "filename": config.output, "encoding": "utf-8"}
    handlers = {"output": handler | {"formatter": "line"}}
    if config.syslog.enabled:
        handlers["syslog"] = {"()": "loom.log.SyslogHandler", "address": config.syslog.address, "formatter": "line"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": "loom.log.Formatter", "style": config.format}},
        "handlers": handlers,
        "root": {"level": config.level.upper(), "handlers": list(handlers)},
        "loggers": {
            "gunicorn.error": {"level": "NOTSET", "handlers": [], "propagate": True},
            "gunicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
        },
    }


class Formatter(logging.Formatter):
    """Makes a record one line of ASCII: time (RFC 3339, UTC), level, event, pid, then its fields."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.join = _as_json if style == "json" else _as_text

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        head = {"time": when.replace("+00:00", "Z"), "level": record.levelname.lower(), "event": record.getMessage()}
        fields = {"pid": record.process, **getattr(record, "fields", {})}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return self.join(_clean({**head, **fields, **head}))


def _clean(value: Any, name: str = "") -> Any:
    """Return a field's value as JSON can hold it, without passwords."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _clean(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean(item) for item in value]
    return "***" if "password" in name.lower() else mask(str(value))


def _as_json(fields: dict[str, Any]) -> str:
    return json.dumps(fields)


def _as_text(fields: dict[str, Any]) -> str:
    """Make `time level event name=value ...`, with JSON's quotes around what would not read as one word."""

    def word(value: Any) -> str:
        plain = isinstance(value, str) and value.isascii() and value.isprintable() and not set(value) & set(' "=')
        return str(value) if plain and value else json.dumps(value)

    when, level, what = fields.pop("time"), fields.pop("level"), fields.pop("event")
    sentence = what if what.isascii() and what.isprintable() else json.dumps(what)
    return " ".join([when, level, sentence, *(f"{name}={word(value)}" for name, value in fields.items())])


class SyslogHandler(logging.Handler):
    """Sends RFC 5424 lines by UDP from a thread of its own.

    A name that doesn't resolve, or a server that is away, costs lines and never time: logging's own
    SysLogHandler resolves the name on the caller's thread for every line.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        host, _, port = address.rpartition(":")
        self.server = host.strip("[]"), int(port)
        self.head = f"{socket.gethostname()} loom"
        self.lines: deque[bytes] = deque(maxlen=1000)
        self.owner = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.owner != os.getpid():  # a thread does not survive a fork; what still waits is the parent's to send
                self.lines.clear()
                self.owner, self.woken, self.closed = os.getpid(), threading.Event(), False
                threading.Thread(target=self._send, name="syslog", daemon=True).start()
            severity = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
            when = datetime.fromtimestamp(record.created, timezone.utc).isoformat()
            line = f"<{FACILITY_DAEMON | severity}>1 {when} {self.head} {record.process} - - {self.format(record)}"
            self.lines.append(line.encode())
            self.woken.set()
        except Exception:  # as every handler of logging: a line that can't be made must not stop who wrote it
            self.handleError(record)

    def _send(self) -> None:
        until = 0.0
        while not self.closed:
            self.woken.wait(60)
            self.woken.clear()
            try:
                if time.monotonic() >= until:
                    family, kind, _, _, address = socket.getaddrinfo(*self.server, type=socket.SOCK_DGRAM)[0]
                    udp, until = socket.socket(family, kind), time.monotonic() + 60
                while self.lines:
                    with contextlib.suppress(OSError):
                        udp.sendto(self.lines[0], address)
                    self.lines.popleft()
            except (OSError, OverflowError, UnicodeError):
                time.sleep(1)
                self.woken.set()

    def flush(self) -> None:
        """Wait for what is not sent yet, at most half a second."""
        until = time.monotonic() + 0.5
        while self.owner == os.getpid() and self.lines and time.monotonic() < until:
            time.sleep(0.01)

    def close(self) -> None:
        if self.owner == os.getpid():
            self.closed = True
            self.woken.set()
        super().close()
