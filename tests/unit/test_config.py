"""Configuration works as the guide shows it, and a fault in it is reported on one line."""

from __future__ import annotations

import re
import socket
from operator import attrgetter
from pathlib import Path
from urllib.parse import quote

import psycopg2
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from loom.config import SHAREABLE, Config, ConfigError, environment, load, mask, resource

QUICK_START = """
database:
  type: postgres
  dsn: "postgresql://loom_user:your_secure_password@postgres-host:5432/loom?sslmode=require"

server:
  http_port: 8080
  enable_http: true
"""
LOGGING = """
logging:
  level: info
  format: json
  output: stdout

  # For centralized logging
  syslog:
    enabled: true
    address: "logs.example.com:514"
"""
TUNING = """
database:
  type: postgres
  dsn: "postgresql://user:pass@host:5432/loom?pool_max_conns=25&pool_min_conns=5"

agents:
  max_concurrent: 20  # Adjust based on instance size
"""
SECURITY = """
database:
  dsn: "postgresql://user:pass@host:5432/loom?sslmode=require"
  # Use environment variable for sensitive data
  # dsn: ${DATABASE_DSN}
"""
DSN = "postgresql://user:pass@host:5432/loom"
PASSWORDS = [
    "simple1",
    "p@ss:wd/1",
    "?qu#ry=1&x=2",
    "[brack]et%41",
    "sp ace d",
    "quo'te\"d",
    "back\\sl\\\\ash",
    "do$l${ar}s$$",
    "naïve-пароль-密码",
    "password=inner",
    "postgresql://a:b@c",
    "x pool_max_conns=3",
    "&pool_max_conns=3",
    "#!*;|<>~`{}",
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(text: str, **variables: str) -> Config:
    Path("config.yaml").write_text(text, encoding="utf-8")
    return load(environ=variables)


def fault(text: str = "", **variables: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, **variables)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_guides_quick_start_works_as_written():
    config = read(QUICK_START)
    assert config.database.type == "postgres"
    assert config.database.dsn == "postgresql://loom_user:your_secure_password@postgres-host:5432/loom?sslmode=require"
    assert config.server.http_port == 8080
    assert config.sources["database.dsn"] == "config.yaml:4"
    assert config.sources["database.pool_max"] == "default"


def test_the_guides_logging_works_as_written():
    logging = read(LOGGING).logging
    assert (logging.level, logging.format, logging.output) == ("info", "json", "stdout")
    assert logging.syslog.enabled
    assert logging.syslog.address == "logs.example.com:514"


def test_off_needs_no_quotes_although_yaml_takes_it_for_a_boolean(tmp_path):
    (tmp_path / "config.yaml").write_text("logging:\n  requests: off\n")
    assert load(str(tmp_path / "config.yaml"), {}).logging.requests == "off"


def test_the_guides_tuning_sizes_the_pool_and_is_hidden_from_libpq():
    config = read(TUNING)
    assert (config.database.pool_min, config.database.pool_max) == (5, 25)
    assert config.database.dsn == DSN
    assert config.sources["database.pool_max"] == "config.yaml:4, pool_max_conns"
    assert config.agents.max_concurrent == 20


def test_the_guides_security_section_works_also_with_its_variable():
    assert read(SECURITY).database.type == "postgres"
    variant = re.sub("  dsn: .*\n.*\n  # dsn", "  dsn", SECURITY)
    assert read(variant, DATABASE_DSN=DSN).database.dsn == DSN


def test_the_guides_containers_need_only_environment_variables():
    config = load(environ={"DATABASE_TYPE": "postgres", "DATABASE_DSN": DSN, "PORT": "8081"})
    assert (config.database.type, config.database.dsn, config.server.http_port) == ("postgres", DSN, 8081)
    assert config.sources["server.http_port"] == "environment PORT"


def test_without_any_setting_the_database_is_embedded():
    assert load(environ={}).database.type == "embedded"
    assert read("# nothing\n").database.type == "embedded"
    assert read("database:\nserver:\n", PORT="").server.http_port == 8080


def test_the_example_file_has_every_key_with_its_default():
    text = resource("config.yaml.example").read_text()
    assert read(text).database == Config().database
    every = re.sub(r"^( *)# ([a-z_]+: )", r"\1\2", text, flags=re.MULTILINE)
    every = re.sub(r"\n  (type|dsn): .*", "", every)
    config = read(every)
    assert (config.database, config.server, config.agents) == (Config().database, Config().server, Config().agents)
    assert (config.locks, config.logging) == (Config().locks, Config().logging)
    unset = {key for key, source in config.sources.items() if source == "default"}
    assert unset == {"database.type", "database.dsn", "database.pool_min", "database.pool_max"}


def test_the_documentation_names_every_key():
    documented = dict(re.findall(r"^\| `([\w.]+)`( ✓)?", resource("docs/configuration.md").read_text(), re.MULTILINE))
    assert documented.keys() == load(environ={}).sources.keys() - {"database.pool_min", "database.pool_max"}
    assert {key for key, mark in documented.items() if mark} == SHAREABLE


def test_every_key_of_the_file_has_a_variable_of_its_own():
    file = re.findall(r"^( *)(?:# )?([a-z_]+):( .+)?$", resource("config.yaml.example").read_text(), re.MULTILINE)
    path, keys = [], []
    for indent, name, value in file:
        path = [*path[: len(indent) // 2], name]
        keys += [".".join(path)] if value else []
    assert "logging.syslog.address" in keys
    assert len(keys) > 20
    Path("dsn").write_text(f"{DSN}\n")
    special = {
        "database.dsn": DSN,
        "server.allowed_hosts": "a.example, b.example",
        "security.allowed_origins": "https://a.example",
        "security.metrics_addresses": "10.0.0.0/8, ::1",
        "database.dsn_file": "dsn",
        "database.password_command": "cat password",
    }
    for key in keys:
        value = special.get(key) or str(attrgetter(key)(Config())).lower()
        variable = f"LOOM_{key.upper().replace('.', '__')}"
        assert load(environ={variable: value}).sources[key] == f"environment {variable}"
    hosts = load(environ={"LOOM_SERVER__ALLOWED_HOSTS": special["server.allowed_hosts"]}).server.allowed_hosts
    assert hosts == ("a.example", "b.example")


def test_an_address_that_others_reach_needs_keys_or_a_word_that_it_does_not():
    for host in ("0.0.0.0", "::", "10.0.0.1", "loom.example.com", "127.0.0.1.nip.io"):
        text = fault(f"server: {{host: '{host}'}}")
        assert text.startswith(f"config.yaml:1: server.host: other hosts can reach {host}: set security.auth to on")
        for auth in ("on", "off"):
            assert read(f"server: {{host: '{host}'}}\nsecurity: {{auth: {auth}}}").security.auth == auth
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert read(f"server: {{host: '{host}'}}").security.auth == "local"


def test_a_dsn_file_is_read_and_a_fault_in_it_shows_no_secret():
    Path("dsn").write_text(f"{DSN}?pool_max_conns=7\n")
    config = read("database: {dsn_file: dsn}")
    assert (config.database.dsn, config.database.type, config.database.pool_max) == (DSN, "postgres", 7)
    assert load(environ={"DATABASE_DSN_FILE": "dsn"}).database.dsn == DSN
    assert "given too" in fault(f"database: {{dsn_file: dsn, dsn: '{DSN}'}}")
    assert read("database: {dsn_file: none}", DATABASE_DSN=DSN).database.dsn_file == "", "the environment wins"
    assert read("database: {dsn: 'host=x'}", DATABASE_DSN_FILE="dsn").database.dsn == DSN
    assert "FileNotFoundError" in fault("database: {dsn_file: none}")
    Path("dsn").write_text("postgresql://u:hunter22@[::1/db")
    assert "hunter22" not in fault("database: {dsn_file: dsn}")


def test_variables_override_the_file_and_the_short_names_override_the_long():
    config = read(
        "server: {threads: 4, host: 127.0.0.2}\nlogging: {syslog: {enabled: false}}",
        LOOM_SERVER__THREADS="16",
        LOOM_LOGGING__SYSLOG__ENABLED="true",
        LOOM_SERVER__HTTP_PORT="9000",
        PORT="9001",
        LOOM_DATABASE__DSN=DSN,
        LOOM_SERVER__HOST="",
    )
    assert (config.server.threads, config.server.host, config.server.http_port) == (16, "127.0.0.2", 9001)
    assert (config.logging.syslog.enabled, config.database.dsn, config.database.type) == (True, DSN, "postgres")
    assert config.sources["server.threads"] == "environment LOOM_SERVER__THREADS"


def test_the_variables_that_kubernetes_makes_of_a_service_called_loom_are_ignored():
    made = {"LOOM_PORT": "tcp://10.0.0.1:80", "LOOM_SERVICE_HOST": "10.0.0.1", "LOOM_PORT_80_TCP_PORT": "80"}
    assert load(environ=made) == load(environ={})


def test_a_misspelt_variable_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"^environment LOOM_SERVER__THREAD: .* is LOOM_SERVER__THREADS$"):
        load(environ={"LOOM_SERVER__THREAD": "1"})


def test_loom_config_names_the_file_and_environment_variables_override_it(tmp_path):
    file = tmp_path / "other.yaml"
    file.write_text(QUICK_START)
    config = load(environ={"LOOM_CONFIG": str(file), "PORT": "9000"})
    assert (config.server.http_port, config.database.type) == (9000, "postgres")
    assert load(str(file), environ={"LOOM_CONFIG": "missing.yaml"}).server.http_port == 8080


def test_the_environment_chooses_between_embedded_and_a_dsn():
    assert read("database: {type: embedded}", DATABASE_DSN=DSN).database.dsn == DSN
    config = read(QUICK_START, DATABASE_TYPE="embedded")
    assert (config.database.type, config.database.dsn) == ("embedded", "")
    assert config.sources["database.dsn"] == "default"


@pytest.mark.parametrize(
    ("dsn", "left", "pool"),
    [
        ("postgresql://h/db?pool_max_conns=4", "postgresql://h/db", (2, 4)),
        ("postgresql://h/db?sslmode=require&pool_min_conns=0", "postgresql://h/db?sslmode=require", (0, 10)),
        ("postgres:///?pool_max_conns=1&host=/tmp", "postgres:///?host=/tmp", (1, 1)),
        ("host=h pool_max_conns=4 dbname=db", "host=h dbname=db", (2, 4)),
        ("pool_min_conns = '3' host=h", "host=h", (3, 10)),
        ("host=h password='x pool_max_conns=3'", "host=h password='x pool_max_conns=3'", (2, 10)),
        ("host=h password=x\\ pool_max_conns=3", "host=h password=x\\ pool_max_conns=3", (2, 10)),
        ("postgresql://u:p?pool_max_conns=3@h/db", "postgresql://u:p?pool_max_conns=3@h/db", (2, 10)),
        (
            "host=a,b port=1,2 target_session_attrs=read-write",
            "host=a,b port=1,2 target_session_attrs=read-write",
            (2, 10),
        ),
    ],
)
def test_the_pool_size_is_removed_from_any_form_of_dsn(dsn, left, pool):
    database = load(environ={"DATABASE_DSN": dsn}).database
    assert parse_dsn(database.dsn) == parse_dsn(left)
    assert (database.pool_min, database.pool_max) == pool


def test_variables_are_expanded_after_the_yaml_is_parsed():
    config = read(
        "logging: {output: '${DIR}/${NAME}.log', level: '${LEVEL}'}\nserver: {http_port: '${P}'}",
        DIR="/x: {y}",
        NAME="a\nserver: {host: evil}",
        LEVEL="error",
        P="8085",
    )
    assert config.logging.output == "/x: {y}/a\nserver: {host: evil}.log"
    assert config.server.host == "127.0.0.1"
    assert config.server.http_port == 8085
    assert read("logging: {output: 'a$b$$c$'}").logging.output == "a$b$$c$"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("databse:\n  type: postgres", "config.yaml:1: databse: unknown key, the nearest valid one is database"),
        ("server:\n  port: 80", "config.yaml:2: server.port: unknown key, the nearest valid one is server.http_port"),
        ("dsn: x", "config.yaml:1: dsn: unknown key, the nearest valid one is database.dsn"),
        ("sources: {}", "config.yaml:1: sources: unknown key, the nearest valid one is"),
        ("database: {pool_max: 3}", "config.yaml:1: database.pool_max: unknown key"),
        ("1: x", "config.yaml:1: 1: unknown key"),
        ("[a]: x", "config.yaml:1: ?: unknown key"),
        ("server:\n  host: a\n  host: b", "config.yaml:3: server.host: given twice"),
        ("server: {}\nserver: {}", "config.yaml:2: server: given twice"),
        ("server: 8080", "config.yaml:1: server: expected keys with values"),
        ("- server", "config.yaml:1: top level: expected keys with values"),
        (
            "server: {http_port: '8080'}",
            "config.yaml:1: server.http_port: expected a port from 1 to 65535, got '8080'",
        ),
        ("server: {http_port: 0}", "expected a port from 1 to 65535, got 0"),
        ("server: {http_port: 70000}", "got 70000"),
        ("server: {http_port: true}", "got True"),
        ("server: {http_port: }", "got None"),
        ("server: {enable_http: false}", "config.yaml:1: server.enable_http: expected true, since Loom has no other"),
        ("server: {enable_http: 'false'}", "server.enable_http: expected true, got 'false'"),
        ("server: {host: ''}", "server.host: expected text, got ''"),
        ("server: {threads: 1.5}", "server.threads: expected a whole number from 1 to 1000, got 1.5"),
        ("server: {drain_seconds: -1}", "server.drain_seconds: expected seconds from 0 to 300, got -1"),
        ("database: {timeout: 0.5}", "database.timeout: expected seconds from 1 to 60, got 0.5"),
        ("database: {timeout: .nan}", "got nan"),
        ("database: {timeout: 5s}", "got '5s'"),
        ("database: {timeout: &a [*a]}", "config.yaml:1: broken YAML: found unconstructable recursive node"),
        ("database: {timeout: {2026-01-01: x}}", "got {datetime.date(2026, 1, 1): 'x'}"),
        ("locks: {history_days: 0}", "locks.history_days: expected days from 1 to 3650, got 0"),
        ("database: {type: mysql}", "database.type: expected postgres or embedded, got 'mysql'"),
        ("database: {type: postgres}", "config.yaml:1: database.type: postgres, but database.dsn (or DATABASE_DSN) is"),
        ("database: {dsn: 5}", "database.dsn: expected a libpq connection string or URI, got int"),
        (f"database:\n  dsn: {DSN}\n  type: embedded", "config.yaml:3: database.type: embedded, but database.dsn is"),
        ("logging: {level: INFO}", "logging.level: expected debug, info, warning or error, got 'INFO'"),
        ("logging: {syslog: {address: nowhere}}", "logging.syslog.address: expected host:port, got 'nowhere'"),
        ("database: {dsn: '${NOT_SET}'}", "config.yaml:1: database.dsn: environment variable NOT_SET is not set"),
        ("database: {dsn: '${NOT_SET:-x}'}", "config.yaml:1: database.dsn: expected only the name of a"),
        (f"database: {{dsn: '{DSN}?pool_max_conn=3'}}", "parameter pool_max_conn, the nearest valid one is pool_max"),
        (f"database: {{dsn: '{DSN}?pool_max_conns=x'}}", "expected a whole number from 1 to 1000, got 'x'"),
        (f"database: {{dsn: '{DSN}?pool_min_conns=11'}}", "pool_min_conns: expected at most 10, which is pool_max"),
        (f"database: {{dsn: '{DSN}?sslmod=x'}}", "config.yaml:1: database.dsn: unknown parameter sslmod, the nearest"),
        ("server: [", "config.yaml:1: broken YAML: "),
        ("server:\n\thost: x", "config.yaml:2: broken YAML: "),
        ("a: b\n---\nc: d", "config.yaml:2: broken YAML: "),
        ("server: {host: 2026-99-99}", "not YAML in UTF-8"),
        ("server: {host: \0}", "not YAML in UTF-8"),
        ("server: " + "[" * 5000, "not YAML in UTF-8"),
    ],
)
def test_a_fault_in_the_file_is_one_line_that_names_file_key_and_remedy(text, line):
    assert line in fault(text)


@pytest.mark.parametrize(
    ("dsn", "line"),
    [
        ("mysql://u:hunter22@h/db", "mysql: expected postgresql://"),
        ("postgres:/u:hunter22@h/db", "postgres: expected postgresql://"),
        ("postgresql://u:hunter22@h:54x2/db", "port: expected a whole number"),
        ("postgresql://u:hunter22@h:99999/db", "port: libpq refuses its value"),
        ("host=a,b port=1,2,3 password=hunter22", "port: libpq refuses its value"),
        ("postgresql://u:hunter22@h/db?sslmode=requir", "sslmode: libpq refuses its value"),
        ("host=a,b target_session_attrs=rw password=hunter22", "target_session_attrs: libpq refuses its value"),
        ("postgresql://u:hunter22@h/db?connect_timeout=5s", "connect_timeout: expected a whole number"),
        ("postgresql://u:hunter22@h/db?sslmode", "sslmode: expected sslmode=value"),
        ("postgresql://u:hunter22@h/db?foo=1", "unknown parameter foo, the nearest valid one is "),
        ("usr=u password=hunter22", "unknown parameter usr, the nearest valid one is user"),
        ("host=h dbname", "dbname: expected dbname=value"),
        ("postgresql://u:hunter22%zz@h/db", "password: a % that stands for itself"),
        ("postgresql://u%zz:hunter22@h/db", "user: a % that stands for itself"),
        ("postgresql://u:hunter22@[::1/db", "host: expected an IPv6 address"),
        ("host=h password=x hunter22", "the password, or what follows it: "),
        ("host=h password=x hunter22=y", "the password, or what follows it: "),
        ("postgresql://u:p?hunter22=x@h/db?sslmod=y", "the password, or what follows it: "),
        ("sslrootcert=system sslmode=prefer password=hunter22", "libpq refuses it: weak sslmode"),
        ("host=h service=hunter password=hunter22", "service: libpq refuses its value"),
    ],
)
def test_a_fault_in_the_dsn_names_the_part_that_is_wrong_and_no_password(dsn, line):
    said = fault(DATABASE_DSN=dsn)
    assert said.startswith(f"environment DATABASE_DSN: database.dsn: {line}")
    assert "hunter22" not in said


def test_a_check_of_the_dsn_connects_to_no_server(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")
        port = server.getsockname()[1]
        for dsn in (f"host=127.0.0.1 port={port}", f"hostaddr=127.0.0.1 port={port}", f"postgresql:///db?port={port}"):
            assert load(environ={"DATABASE_DSN": dsn}).database.dsn == dsn
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_fault_in_the_environment_names_the_variable():
    assert fault(PORT="eighty") == "environment PORT: server.http_port: expected a port from 1 to 65535, got 'eighty'"
    assert fault(DATABASE_TYPE="sqlite").startswith("environment DATABASE_TYPE: database.type: expected postgres or")
    assert fault(DATABASE_TYPE="postgres").startswith("environment DATABASE_TYPE: database.type: postgres, but")
    assert fault(DATABASE_TYPE="embedded", DATABASE_DSN=DSN).startswith("environment DATABASE_TYPE: database.type: em")


def test_a_file_that_cannot_be_read_stops_the_start(tmp_path):
    assert fault(LOOM_CONFIG="missing.yaml") == "missing.yaml: cannot be read: No such file or directory"
    assert fault(LOOM_CONFIG=str(tmp_path)).endswith("cannot be read: Is a directory")
    Path("latin.yaml").write_bytes("server: {host: ü}".encode("latin-1"))
    assert fault(LOOM_CONFIG="latin.yaml") == "latin.yaml: not YAML in UTF-8"


def traces(password: str) -> set[str]:
    """Return the texts that would reveal a password: itself, percent-encoded, or a piece between special characters."""
    pieces = {piece for piece in re.split(r"[^\w]+", password) if len(piece) > 4}
    return pieces - {"password", "pool_max_conns", "postgresql"} | {password, quote(password, safe="")}


def dsns_of(password: str) -> list[str]:
    encoded = quote(password, safe="")
    return [
        f"postgresql://user:{encoded}@host:5432/db?sslmode=require",
        f"postgres://user@host/db?password={encoded}&application_name=a",
        f"postgresql://host/db?sslmode=require&sslpassword={encoded}",
        make_dsn(host="host", password=password, dbname="db"),
        make_dsn(host="host", sslpassword=password),
    ]


def broken_dsns_of(password: str) -> list[str]:
    return [
        f"postgresql://user:{password}@host:port/db",
        f"postgresql://user:{password}@host/db?nonsense=1",
        f"postgresql://user:{password}%zz@host/db",
        f"postgresql+psycopg2://user:{quote(password)}@host/db",
        make_dsn(password=password) + " nonsense",
        make_dsn(password=password) + " host='unterminated",
    ]


@pytest.mark.parametrize("password", PASSWORDS)
def test_a_password_is_masked_in_every_form_of_valid_dsn(password):
    for dsn in dsns_of(password):
        database = load(environ={"DATABASE_DSN": dsn}).database
        assert password in parse_dsn(database.dsn).values()
        for text in (mask(dsn), mask(f"cannot reach {dsn}"), mask(f"{{'dsn': {dsn!r}}}"), repr(load(environ={}))):
            assert not [trace for trace in traces(password) if trace in text], text
        assert parse_dsn(mask(dsn)).keys() == parse_dsn(dsn).keys()


@pytest.mark.parametrize("password", PASSWORDS)
def test_no_error_about_a_dsn_shows_its_password(password):
    for dsn in broken_dsns_of(password):
        line = fault(DATABASE_DSN=dsn)
        assert line.startswith("environment DATABASE_DSN: database.dsn: ")
        assert not [trace for trace in traces(password) if trace in line], line
        assert not [trace for trace in traces(password) if trace in mask(dsn)], mask(dsn)
        with pytest.raises(psycopg2.Error) as caught:
            psycopg2.connect(dsn, application_name="x")
        assert not [trace for trace in traces(password) if trace in mask(str(caught.value))], mask(str(caught.value))


@pytest.mark.parametrize("dsn", ["postgresql://u:pa/ss@h/db", "postgresql://u:p@ss@h/db", "postgresql://u:12/3@h"])
def test_a_password_that_libpq_would_read_as_a_host_is_refused(dsn):
    assert fault(DATABASE_DSN=dsn).endswith("need percent-encoding in a URI (@ is %40, / is %2F)")


@pytest.mark.parametrize(
    "text",
    [
        "database: {dsn: *hunter22}",
        "database: {dsn: !hunter22 x}",
        'database: {dsn: "\\hunter22"}',
        "database: postgresql://u:hunter22@h/db",
        "postgresql://u:hunter22@h/db: x",
        "database: {type: 'postgresql://u:hunter22@h/db'}",
        "database: {type: 'host=h password=hunter22'}",
        "database:\n  dsn: 'postgresql://u:hunter22@h/db",
        "database:\n  dsn: host=h password: hunter22",
        "database: {dsn: [hunter22]}",
        "database: {dsn: 'postgresql://u:${hunter22 x}@h/db'}",
    ],
)
def test_no_error_about_the_file_shows_a_password(text):
    assert "hunter22" not in fault(text)


def test_masking_does_not_change_ordinary_text():
    for text in (
        "",
        "heartbeat",
        "listening at http://127.0.0.1:8080",
        'FATAL: password authentication failed for user "x"',
        "postgresql://user@host:5432/loom refused",
        "a=b: c",
    ):
        assert mask(text) == text


def test_a_child_process_gets_the_environment_with_changes(monkeypatch):
    monkeypatch.setenv("PORT", "1")
    assert environment(DATABASE_DSN="x")["PORT"] == "1"
    assert environment(PORT="2")["PORT"] == "2"


def test_a_missing_file_of_the_installation_is_named():
    with pytest.raises(ConfigError, match=r"nothing\.sql: neither in "):
        resource("nothing.sql")
