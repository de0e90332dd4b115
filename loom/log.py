"""Log lines: one event per line with its fields, as JSON or text. Passwords are masked.

`logger.warning("lock-lost", extra={"fields": {"lock_name": name}})`
"""

from __future__ import annotations

import functools
import json
import logging
import logging.config
import os
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import msgspec

from loom.config import ConfigError, LoggingConfig, environment
from loom.dsn import mask, may_hold_secret
from loom.log_writer import Handler, Line
from loom.syslog import Destination, look_up_in_process

log = logging.getLogger("loom.log")


def setup(config: LoggingConfig, terminal_port: int | None = None) -> dict[str, Any]:
    """Configure the root logger, and return the settings with which gunicorn does the same.

    If the output is a terminal and `terminal_port` is given, the lines there are short, with this port in front.
    Raises ConfigError when the file can't be opened.
    """
    destination, reason = None, ""
    if config.syslog.enabled:
        destination, reason = look_up_in_process(config.syslog.address)
    settings = dict_config(config, destination)
    if terminal_port is not None and on_terminal(config.output):
        settings["formatters"]["short"] = {"()": "loom.log.ShortFormatter", "port": terminal_port}
        settings["handlers"]["output"]["formatter"] = "short"
    try:
        logging.config.dictConfig(settings)
    except ValueError as exc:
        raise ConfigError(f"logging.output: {config.output}: {exc.__cause__ or exc}") from None
    if config.syslog.enabled and destination is None:
        log.warning("syslog-unreachable", extra={"fields": {"address": config.syslog.address, "reason": reason}})
    return settings


def on_terminal(output: str) -> bool:
    return output in ("stdout", "stderr") and os.isatty({"stdout": 1, "stderr": 2}[output])


class _ThisThread(threading.local):
    request_id: str | None = None


this_thread = _ThisThread()  # the request that it works on, whose id each line gets


def start_threads() -> None:
    """In a worker, after its fork: write the lines in threads, so that nobody who logs waits."""
    for handler in _handlers():
        handler.start()


def usage() -> dict[str, dict[str, int]]:
    """By target (`output`, `syslog`): the log lines that wait (`queued`), and those that were lost (`dropped`)."""
    return {str(handler.name): handler.usage() for handler in _handlers()}


def _handlers() -> list[Handler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, Handler)]


def write(event: str, level: int, fields: dict[str, Any]) -> None:
    """Log an event to our handlers alone; a LogRecord, and the search for its line, would take longer than the rest."""
    name, created = logging.getLevelName(level), time.time()
    for handler in _handlers():
        if handler.has_room() and isinstance(handler.formatter, Formatter):
            text = handler.formatter.line(created, name, event, {"pid": os.getpid(), **fields})
            handler.put(Line(name, created, text))


def set_level(level: str) -> None:
    """Change the level (debug, info, warning, error) of this process from now on."""
    logging.getLogger().setLevel(level.upper())


def dict_config(config: LoggingConfig, syslog_destination: Destination | None = None) -> dict[str, Any]:
    """Return settings for logging.config.dictConfig, for our loggers and gunicorn's; without a line per request."""
    handlers: dict[str, Any] = {
        "output": {"()": "loom.log_writer.OutputHandler", "output": config.output, "formatter": "line"}
    }
    if config.syslog.enabled:
        handlers["syslog"] = {
            "()": "loom.syslog.SyslogHandler",
            "address": config.syslog.address,
            "destination": syslog_destination,
            "formatter": "line",
        }
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


_encode = msgspec.json.Encoder(enc_hook=str).encode


class Formatter(logging.Formatter):
    """Formats a record as one line of ASCII: time (RFC 3339, UTC), level, event, pid, then its fields."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.join = _as_json if style == "json" else _as_text

    def format(self, record: logging.LogRecord) -> str:
        fields = {"pid": record.process, **getattr(record, "fields", {})}
        if this_thread.request_id is not None:
            fields.setdefault("request_id", this_thread.request_id)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return self.line(record.created, record.levelname, record.getMessage(), fields)

    def line(self, created: float, level: str, event: str, fields: dict[str, Any]) -> str:
        seconds, milliseconds = divmod(int(created * 1000), 1000)
        head = {"time": f"{_until_second(seconds)}.{milliseconds:03}Z", "level": level.lower(), "event": event}
        return self.join({**head, **fields, **head})


@functools.lru_cache(2)
def _until_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def _clean(value: Any, name: str = "") -> Any:
    """Return a field's value as JSON types, with passwords masked."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _clean(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean(item) for item in value]
    return "***" if "password" in name.lower() else mask(str(value))


def _as_json(fields: dict[str, Any]) -> str:
    try:  # for the lines of requests, most of which need no masking
        line = _encode(fields).decode()
    except (TypeError, ValueError):  # half a surrogate pair, for example
        line = ""
    if line and line.isascii() and not may_hold_secret(line):
        return line
    return json.dumps(_clean(fields), separators=(",", ":"))


def _as_text(fields: dict[str, Any]) -> str:
    """Return `time level event name=value ...`; a value that is not one plain word is quoted as in JSON."""

    fields = _clean(fields)
    when, level, what = fields.pop("time"), fields.pop("level"), fields.pop("event")
    return " ".join([when, level, _sentence(what), *_pairs(fields)])


def _sentence(event: str) -> str:
    return event if event.isascii() and event.isprintable() else json.dumps(event)


def _word(value: Any) -> str:
    plain = isinstance(value, str) and value.isascii() and value.isprintable() and not set(value) & set(' "=')
    return str(value) if plain and value else json.dumps(value)


def _pairs(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_word(value)}" for name, value in fields.items()]


def coloured() -> bool:
    """Whether the user of a terminal wants colours; see no-color.org."""
    variables = environment()
    return not variables.get("NO_COLOR") and variables.get("TERM") != "dumb"


def painted(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if code else text


class ShortFormatter(Formatter):
    """For a terminal: port, time of day, the event, and of its fields those that people want. Clients may have chosen
    some of them: they are printed without control characters.
    """

    LEVELS = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
    STATUSES = {2: "32", 4: "33", 5: "31"}
    HIDDEN = {"pid", "port", "instance_id", "request_id", "version", "exception"}

    def __init__(self, port: int) -> None:
        super().__init__("text")
        self._paint = painted if coloured() else lambda text, _: text
        self._port = self._paint(str(port), str(34 + port % 3))

    def line(self, created: float, level: str, event: str, fields: dict[str, Any]) -> str:
        fields = _clean(fields)
        if event == "request":
            words = self._of_request(fields)
        else:
            words = [_sentence(_clean(event)), *_pairs({k: v for k, v in fields.items() if k not in self.HIDDEN})]
            if level in self.LEVELS:
                words = [self._paint(" ".join([level.lower(), *words]), self.LEVELS[level])]
        when = datetime.fromtimestamp(created).strftime("%H:%M:%S")
        stack = ("".join(c if c.isprintable() else " " for c in row) for row in fields.get("exception", "").split("\n"))
        return "\n    ".join([" ".join([self._port, when, *words]), *filter(None, stack)])

    def _of_request(self, fields: dict[str, Any]) -> list[str]:
        status = self._paint(str(fields["status"]), self.STATUSES.get(fields["status"] // 100, ""))
        words = [_word(fields["method"] or "-"), _word(fields["path"]), status, f"{fields['duration_ms']} ms"]
        return words if fields["caller"] in ("", "local") else [*words, _word(fields["caller"])]
