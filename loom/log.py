"""Log lines: one event per line with its fields, as JSON or text. Passwords are masked.

`logger.warning("lock-lost", extra={"fields": {"lock_name": name}})`
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.config
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from loom.config import ConfigError, LoggingConfig
from loom.dsn import mask

log = logging.getLogger("loom.log")

FACILITY_DAEMON = 3 << 3
LOOK_UP_SECONDS = 2.0  # for which setup() waits for the address of the syslog server
LOOK_UP_PERIOD = 60.0  # seconds between two look-ups of that address in a worker
RETRY_PERIOD = 2.0  # seconds, after a look-up that failed

Destination = tuple[int, tuple[Any, ...]]  # an address family, and an address for sendto()


def setup(config: LoggingConfig) -> dict[str, Any]:
    """Configure the root logger, and return the settings with which gunicorn does the same.

    Raises ConfigError when the file can't be opened.
    """
    destination, reason = None, ""
    if config.syslog.enabled:
        destination, reason = _look_up_in_process(config.syslog.address)
    settings = dict_config(config, destination)
    try:
        logging.config.dictConfig(settings)
    except ValueError as exc:
        raise ConfigError(f"logging.output: {config.output}: {exc.__cause__ or exc}") from None
    if config.syslog.enabled and destination is None:
        log.warning("syslog-unreachable", extra={"fields": {"address": config.syslog.address, "reason": reason}})
    return settings


def follow_syslog() -> None:
    """In a worker, after its fork: look up the address of the syslog server from time to time."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, SyslogHandler):
            handler.follow()


def set_level(level: str) -> None:
    """Change the level (debug, info, warning, error) of this process from now on."""
    logging.getLogger().setLevel(level.upper())


def dict_config(config: LoggingConfig, syslog_destination: Destination | None = None) -> dict[str, Any]:
    """Return settings for logging.config.dictConfig, for our loggers and gunicorn's; without a line per request."""
    handler: dict[str, Any] = {"class": "logging.StreamHandler", "stream": f"ext://sys.{config.output}"}
    if config.output not in ("stdout", "stderr"):
        handler = {"class": "logging.handlers.WatchedFileHandler", "filename": config.output, "encoding": "utf-8"}
    handlers = {"output": handler | {"formatter": "line"}}
    if config.syslog.enabled:
        handlers["syslog"] = {
            "()": "loom.log.SyslogHandler",
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


class Formatter(logging.Formatter):
    """Formats a record as one line of ASCII: time (RFC 3339, UTC), level, event, pid, then its fields."""

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
    """Return a field's value as JSON types, with passwords masked."""
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
    """Return `time level event name=value ...`; a value that is not one plain word is quoted as in JSON."""

    def word(value: Any) -> str:
        plain = isinstance(value, str) and value.isascii() and value.isprintable() and not set(value) & set(' "=')
        return str(value) if plain and value else json.dumps(value)

    when, level, what = fields.pop("time"), fields.pop("level"), fields.pop("event")
    sentence = what if what.isascii() and what.isprintable() else json.dumps(what)
    return " ".join([when, level, sentence, *(f"{name}={word(value)}" for name, value in fields.items())])


LOOK_UP_ERRORS = (OSError, OverflowError, UnicodeError)  # raised for an address that does not resolve


def look_up(address: str, flags: int = 0) -> Destination:
    """Resolve `host:port`. Raises one of LOOK_UP_ERRORS."""
    host, _, port = address.rpartition(":")
    family, _, _, _, sockaddr = socket.getaddrinfo(host.strip("[]"), int(port), 0, socket.SOCK_DGRAM, 0, flags)[0]
    return family, sockaddr


# The same, for another process, without Loom's code.
_LOOK_UP = """
import json, socket, sys
host, port = sys.argv[1:]
family, _, _, _, sockaddr = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
print(json.dumps([family, sockaddr]))
"""


def _look_up_in_process(address: str) -> tuple[Destination | None, str]:
    """Resolve `host:port` within LOOK_UP_SECONDS; return None and the reason if that fails.

    getaddrinfo() can take half a minute if a name server does not answer. It runs in another process, which can be
    killed: a thread would go on, and a gunicorn master must have none (see SyslogHandler).
    """
    with contextlib.suppress(*LOOK_UP_ERRORS):
        return look_up(address, socket.AI_NUMERICHOST), ""
    host, _, port = address.rpartition(":")
    command = [sys.executable, "-I", "-S", "-c", _LOOK_UP, host.strip("[]"), port]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_UP_SECONDS, check=True)
        family, sockaddr = json.loads(run.stdout)
        return (family, tuple(sockaddr)), ""
    except subprocess.TimeoutExpired:
        return None, f"no name server answered within {LOOK_UP_SECONDS:.0f} s"
    except subprocess.CalledProcessError as exc:
        return None, exc.stderr.strip().rpartition("\n")[2]
    except OSError as exc:
        return None, str(exc)


class SyslogHandler(logging.Handler):
    """Sends RFC 5424 lines by UDP, and never waits: a line that cannot be sent at once does not reach the server.

    Only the look-up of the server's address can take long. setup() does it once, and a worker repeats it in a thread.
    A gunicorn master must not have a thread: if it forks while the thread imports a module, for instance, the import
    stays half done in the worker for ever.
    """

    def __init__(self, address: str, destination: Destination | None = None) -> None:
        super().__init__()
        self.address = address
        self.head = f"{socket.gethostname()} loom"
        self.closed = threading.Event()
        self.reported: set[int | None] = set()  # errno of each kind of failure that has been logged
        self.destination: Destination | None = None
        self.send: Callable[[bytes], object] | None = None
        if destination is not None:
            self._send_to(destination)

    def follow(self) -> None:
        """Look up the address from time to time, in a thread. Not in a process that forks."""
        threading.Thread(target=self._follow, name="syslog-address", daemon=True).start()

    def _follow(self) -> None:
        failed = self.destination is None
        while not self.closed.wait(RETRY_PERIOD if failed else LOOK_UP_PERIOD):
            try:
                self._send_to(look_up(self.address))
                failed = False
            except LOOK_UP_ERRORS:  # the last address, if any, stays in use
                failed = True

    def _send_to(self, destination: Destination) -> None:
        if destination != self.destination:
            family, sockaddr = destination
            udp = socket.socket(family, socket.SOCK_DGRAM)
            udp.setblocking(False)
            self.destination, self.send = destination, lambda line: udp.sendto(line, sockaddr)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            severity = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
            when = datetime.fromtimestamp(record.created, timezone.utc).isoformat()
            line = f"<{FACILITY_DAEMON | severity}>1 {when} {self.head} {record.process} - - {self.format(record)}"
            if self.send is not None:
                self.send(line.encode())
        except OSError as exc:
            self._report(exc)
        except Exception:  # as in each logging handler: a line that cannot be formatted must not stop the program
            self.handleError(record)

    def _report(self, exc: OSError) -> None:
        """Log once for each kind of failure that lines do not reach the syslog server."""
        if exc.errno not in self.reported:
            self.reported.add(exc.errno)
            log.warning("syslog-unreachable", extra={"fields": {"address": self.address, "reason": str(exc)}})

    def close(self) -> None:
        self.closed.set()
        self.send = None
        super().close()
