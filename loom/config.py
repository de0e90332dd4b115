"""Settings: a YAML file, overridden by environment variables. No other module reads either of them."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
import yaml

from loom.dsn import check as check_dsn
from loom.dsn import mask, take_pool
from loom.sections import (
    AgentsConfig,
    BeadsConfig,
    Config,
    DatabaseConfig,
    EventsConfig,
    LocksConfig,
    LoggingConfig,
    SecurityConfig,
    ServerConfig,
    SyslogConfig,
)

__all__ = [
    "AgentsConfig",
    "BeadsConfig",
    "Config",
    "ConfigError",
    "DatabaseConfig",
    "EventsConfig",
    "LocksConfig",
    "LoggingConfig",
    "SecurityConfig",
    "ServerConfig",
    "SyslogConfig",
]


class ConfigError(Exception):
    """A setting is wrong. The text is one line: the file or variable, the key, and what is expected."""


class _Setting(NamedTuple):
    value: Any
    source: str
    textual: bool = False  # from the environment, where every value is text


def _walk(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key with its annotated type, and each section with its dataclass."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        yield prefix + name, hint
        if is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


_KEYS = dict(_walk(Config))
_POOL = {"pool_max_conns": "database.pool_max", "pool_min_conns": "database.pool_min"}
_IN_FILE = sorted(_KEYS.keys() - {"sources", *_POOL.values()})
SECTIONS = frozenset(key for key, kind in _KEYS.items() if is_dataclass(kind))  # including logging.syslog
SETTINGS = _KEYS.keys() - SECTIONS - {"sources"}
# The settings that instances can share: a shared value overrides the one with which an instance was started.
SHAREABLE = frozenset(
    key
    for key in SETTINGS
    if key.startswith(("agents.", "beads.", "locks.", "events.", "logging.level", "logging.retention", "logging.max"))
)
# For every key of the file: LOOM_LOGGING__SYSLOG__ENABLED. The short names are those that platforms and people expect.
_LONG = {f"LOOM_{key.upper().replace('.', '__')}": key for key in _IN_FILE if key not in SECTIONS}
_SHORT = {"PORT": "server.http_port"} | {
    f"DATABASE_{name.upper()}": f"database.{name}" for name in ("type", "dsn", "dsn_file")
}
_VARIABLES = {**_LONG, **_SHORT}  # in this order: the last one that is set counts


def load(path: str | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Read the file (`path`, else LOOM_CONFIG, else ./config.yaml if it exists) and the environment.

    An empty variable counts as unset. Raises ConfigError.
    """
    environ = {name: value for name, value in (os.environ if environ is None else environ).items() if value}
    path = path or environ.get("LOOM_CONFIG") or ("config.yaml" if Path("config.yaml").exists() else None)
    given = _read(path, environ) if path else {}
    for variable in environ:  # others may be Kubernetes', as LOOM_PORT is: it names them after a service
        if variable.startswith("LOOM_") and "__" in variable and variable not in _LONG:
            near = nearest(variable, _LONG)
            raise ConfigError(f"environment {_shown(variable)}: unknown variable, the nearest valid one is {near}")
    for variable, key in _VARIABLES.items():
        if variable in environ:
            given[key] = _Setting(environ[variable], f"environment {variable}", textual=True)
    values = {key: _convert(key, setting) for key, setting in given.items()}
    sources = {key: setting.source for key, setting in given.items()}
    if not values.get("server.enable_http", True):
        raise ConfigError(
            f"{sources['server.enable_http']}: server.enable_http: expected true, since Loom has no other interface"
        )
    _choose_database(values, sources)
    host = values.get("server.host", ServerConfig.host)
    if values.get("security.auth", SecurityConfig.auth) == "local" and not is_loopback(host):
        raise ConfigError(
            f"{sources['server.host']}: server.host: other hosts can reach {host}: set security.auth to on, and create"
            " a key by `loom keys create --role admin NAME`; off lets everybody do everything"
        )
    tree: dict[str, Any] = {"sources": {key: sources.get(key, "default") for key in SETTINGS}}
    for key, value in values.items():
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[name] = value
    return msgspec.convert(tree, Config)


def _read(path: str, environ: Mapping[str, str]) -> dict[str, _Setting]:
    """Return the settings of the file, by dotted key, each with its `path:line`."""
    given: dict[str, _Setting] = {}

    def read_section(node: yaml.Node | None, section: str) -> None:
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return
        where = f"{path}:{node.start_mark.line + 1}: {section or 'top level'}"
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{where}: expected keys with values")
        seen = set()
        for key_node, value_node in node.value:
            word = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            key = f"{section}.{word}" if section else word
            source = f"{path}:{key_node.start_mark.line + 1}"
            if key not in _IN_FILE:
                near = nearest(key, _IN_FILE)
                raise ConfigError(f"{source}: {_shown(key)}: unknown key, the nearest valid one is {near}")
            if key in seen:
                raise ConfigError(f"{source}: {key}: given twice")
            seen.add(key)
            if is_dataclass(_KEYS[key]):
                read_section(value_node, key)
            else:
                value = loader.construct_object(value_node, deep=True)
                if isinstance(value, bool) and value_node.value in allowed(key):  # in YAML, off is false
                    value = value_node.value
                expanded = _expand(value, f"{source}: {key}", environ) if isinstance(value, str) else value
                given[key] = _Setting(expanded, source, textual=expanded != value)

    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        read_section(loader.get_single_node(), "")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from None
    except yaml.MarkedYAMLError as exc:
        # What PyYAML quotes (and the excerpt in its str()) can be part of a password.
        problem = re.sub(r"'[^<].*'", "...", str(exc.problem), flags=re.DOTALL)
        line = f":{exc.problem_mark.line + 1}" if exc.problem_mark else ""
        raise ConfigError(f"{path}{line}: broken YAML: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{path}: not YAML in UTF-8") from None
    return given


def _expand(text: str, where: str, environ: Mapping[str, str]) -> str:
    """Replace `${NAME}`, after the YAML is parsed, so that a value cannot add keys."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"{where}: expected only the name of a variable between ${{ and }}")
        if name not in environ:
            raise ConfigError(f"{where}: environment variable {name} is not set")
        return environ[name]

    return re.sub(r"\$\{([^}]*)\}", value, text)


def nearest(key: str, valid: Iterable[str] = ()) -> str:
    """The valid key (by default, any setting's) that is most similar to `key`, as a whole and in its last word."""

    def likeness(candidate: str) -> float:
        pairs = (key, candidate), (key.rpartition(".")[2], candidate.rpartition(".")[2])
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(valid or sorted(SETTINGS), key=likeness)


def _convert(key: str, setting: _Setting) -> Any:
    try:
        return check(key, setting.value, textual=setting.textual)
    except ValueError as exc:
        raise ConfigError(f"{setting.source}: {key}: {exc}") from None


def check(key: str, value: Any, *, textual: bool = False) -> Any:
    """The checked value of a setting; if `textual`, converted from text, where a list is separated by commas.

    Raises ValueError with what is expected.
    """
    if textual and get_origin(get_args(_KEYS[key])[0]) is tuple:
        value = [part.strip() for part in value.split(",")]
    try:
        return msgspec.convert(value, _KEYS[key], strict=not textual)
    except msgspec.ValidationError:
        expected = _KEYS[key].__metadata__[0].description
        got = type(value).__name__ if key == "database.dsn" else _shown(repr(value))
        raise ValueError(f"expected {expected}, got {got}") from None


def allowed(key: str) -> list[str]:
    """The values that a setting may have, if they are listed; otherwise an empty list."""
    return list(get_args(get_args(_KEYS[key])[0]))


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with some values replaced, by dotted key."""

    def changed(section: Any, path: list[str], value: Any) -> Any:
        name, *rest = path
        return replace(section, **{name: changed(getattr(section, name), rest, value) if rest else value})

    for key, value in values.items():
        config = changed(config, key.split("."), value)
    return config


def is_loopback(host: str) -> bool:
    """Whether only this host can reach an address, or a listener on it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _shown(text: str) -> str:
    return mask(text)[:60]


def _choose_database(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Settle type, DSN and pool: a DSN without a type means postgres; the environment overrides the file for both."""
    kind, type_source = values.get("database.type"), sources.get("database.type", "")
    if values.get("database.dsn_file") and "database.dsn" in values:
        given = {key: sources[key].startswith("environment") for key in ("database.dsn", "database.dsn_file")}
        if len(set(given.values())) == 1:
            raise ConfigError(f"{sources['database.dsn_file']}: database.dsn_file: database.dsn is given too")
        (overridden,) = (key for key, is_environment in given.items() if not is_environment)
        del values[overridden], sources[overridden]
    if values.get("database.dsn_file"):
        source = sources["database.dsn"] = sources["database.dsn_file"]
        try:
            values["database.dsn"] = Path(values["database.dsn_file"]).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{source}: database.dsn_file: cannot be read: {type(exc).__name__}") from None
    if "database.dsn" in values and kind == "embedded":
        if type_source.startswith("environment") == sources["database.dsn"].startswith("environment"):
            raise ConfigError(f"{type_source}: database.type: embedded, but database.dsn is given too")
        if type_source.startswith("environment"):
            del values["database.dsn"], sources["database.dsn"]
    if "database.dsn" not in values:
        if kind == "postgres":
            raise ConfigError(
                f"{type_source}: database.type: postgres, but database.dsn (or DATABASE_DSN) is not given"
            )
        return
    source = sources["database.dsn"]
    if kind != "postgres":
        values["database.type"], sources["database.type"] = "postgres", source
    dsn, pool = take_pool(values["database.dsn"])
    for name, size in pool.items():
        if name not in _POOL:
            near = nearest(name, _POOL)
            raise ConfigError(f"{source}: database.dsn: unknown parameter {name}, the nearest valid one is {near}")
        key = _POOL[name]
        sources[key] = f"{source}, {name}"
        values[key] = _convert(key, _Setting(size, f"{source}: database.dsn: {name}", textual=True))
    most = values.get("database.pool_max", DatabaseConfig.pool_max)
    if values.setdefault("database.pool_min", min(DatabaseConfig.pool_min, most)) > most:
        raise ConfigError(f"{source}: database.dsn: pool_min_conns: expected at most {most}, which is pool_max_conns")
    try:
        check_dsn(dsn)
    except ValueError as exc:
        raise ConfigError(f"{source}: database.dsn: {exc}") from None
    values["database.dsn"] = dsn


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of this process with changes, for a child process."""
    return {**os.environ, **changes}


def resource(name: str) -> Path:
    """Find a file that is shipped with the package: in the checkout, or in the share/loom of an installation.

    An installation may be a virtual environment, the user's or the system's: the nearest folder counts.
    Raises ConfigError when there is none.
    """
    checkout, *above = Path(__file__).resolve().parents[1:]
    for folder in (checkout, *(base / "share" / "loom" for base in (checkout, *above))):
        if (folder / name).exists():
            return folder / name
    raise ConfigError(f"{name}: neither in {checkout} nor in a share/loom above it; install Loom again")
