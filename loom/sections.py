"""The sections of config.yaml, with types, ranges and defaults. loom/config.py reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

Text = Annotated[str, Meta(min_length=1, description="text")]
Count = Annotated[int, Meta(ge=1, le=1000, description="a whole number from 1 to 1000")]
Level = Literal["debug", "info", "warning", "error"]
Days = Annotated[int, Meta(ge=1, le=3650, description="days from 1 to 3650")]
Host = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,253}$")]
Network = Annotated[str, Meta(pattern=r"^[0-9a-fA-F.:]+(/[0-9]{1,3})?$")]
Origin = Annotated[str, Meta(pattern=r"^https?://[a-z0-9._-]{1,253}(:[0-9]{1,5})?$")]


@dataclass(frozen=True)
class DatabaseConfig:
    """`dsn` is a DSN for libpq, without `pool_*`, or "" if the database is embedded; `timeout` is in seconds.

    `dsn_file` and `password_command`: where credentials.py finds what may change while Loom runs.
    """

    type: Annotated[Literal["postgres", "embedded"], Meta(description="postgres or embedded")] = "embedded"
    dsn: Annotated[str, Meta(min_length=1, description="a libpq connection string or URI")] = field(
        default="", repr=False
    )
    dsn_file: Annotated[str, Meta(description="the path of a file")] = ""
    password_command: Annotated[str, Meta(description="a command")] = field(default="", repr=False)
    pool_min: Annotated[int, Meta(ge=0, le=1000, description="a whole number from 0 to 1000")] = 2
    pool_max: Count = 10
    timeout: Annotated[float, Meta(ge=1, le=60, description="seconds from 1 to 60")] = 5.0
    folder: Text = "var/postgres"


@dataclass(frozen=True)
class ServerConfig:
    """Where an instance listens, and under which names; `drain_seconds`: how long it still accepts after SIGTERM."""

    host: Text = "127.0.0.1"
    allowed_hosts: Annotated[tuple[Host, ...], Meta(description="a list of host names")] = ()
    http_port: Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")] = 8080
    enable_http: Annotated[bool, Meta(description="true")] = True
    threads: Count = 8
    workers: Count = 1
    drain_seconds: Annotated[float, Meta(ge=0, le=300, description="seconds from 0 to 300")] = 0.0


@dataclass(frozen=True)
class SecurityConfig:
    """`auth`: who needs a key: nobody on this host (local), everybody (on), nobody (off).

    `allowed_origins`: of pages that may use the interface from a browser. `metrics_addresses`: those that need no key
    for /metrics.
    """

    auth: Annotated[Literal["local", "on", "off"], Meta(description="local, on or off")] = "local"
    metrics_addresses: Annotated[tuple[Network, ...], Meta(description="a list of IP addresses or networks")] = ()
    allowed_origins: Annotated[
        tuple[Origin, ...], Meta(description="a list of origins such as https://ui.example.com")
    ] = ()


@dataclass(frozen=True)
class AgentsConfig:
    """`max_concurrent` bounds the beads in progress per agent; the others are seconds."""

    max_concurrent: Count = 20
    dead_after: Annotated[int, Meta(ge=10, le=86400, description="seconds from 10 to 86400")] = 120
    file_lock_timeout: Annotated[int, Meta(ge=1, le=86400, description="seconds from 1 to 86400")] = 600


@dataclass(frozen=True)
class BeadsConfig:
    """After this number of failures, or of claims without success, a bead is blocked."""

    max_failures: Count = 5
    max_attempts: Count = 20


@dataclass(frozen=True)
class LocksConfig:
    """How many days the history of grants and of claims is kept."""

    history_days: Days = 7


@dataclass(frozen=True)
class EventsConfig:
    """How many days events are kept, and with them the history of every entity."""

    history_days: Days = 30


@dataclass(frozen=True)
class SyslogConfig:
    """A syslog server that takes UDP."""

    enabled: Annotated[bool, Meta(description="true or false")] = False
    address: Annotated[str, Meta(pattern=r"^(\[[0-9a-fA-F:.%]+\]|[^\s:]+):[0-9]{1,5}$", description="host:port")] = (
        "localhost:514"
    )


@dataclass(frozen=True)
class LoggingConfig:
    """`output` is stdout, stderr or the path of a file.

    `requests`: of which requests a line is logged, and a row written to request_logs. Rows are kept for
    `retention_days`, and the oldest are removed if all of them have more than `max_gb` (10^9 bytes).
    """

    level: Annotated[Level, Meta(description="debug, info, warning or error")] = "info"
    format: Annotated[Literal["json", "text"], Meta(description="json or text")] = "json"
    output: Text = "stdout"
    requests: Annotated[Literal["all", "errors", "off"], Meta(description="all, errors or off")] = "all"
    retention_days: Days = 30
    max_gb: Annotated[float, Meta(ge=0.001, le=100_000, description="a number from 0.001 to 100000")] = 10.0
    syslog: SyslogConfig = SyslogConfig()


@dataclass(frozen=True)
class Config:
    """All settings; `sources` tells by dotted key where each value comes from."""

    database: DatabaseConfig = DatabaseConfig()
    server: ServerConfig = ServerConfig()
    security: SecurityConfig = SecurityConfig()
    agents: AgentsConfig = AgentsConfig()
    beads: BeadsConfig = BeadsConfig()
    locks: LocksConfig = LocksConfig()
    events: EventsConfig = EventsConfig()
    logging: LoggingConfig = LoggingConfig()
    sources: Mapping[str, str] = field(default_factory=dict)
