"""Fixtures: one PostgreSQL a session, one database a test, the application in this process or in gunicorns."""

from __future__ import annotations

import gc
import os
import platform
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version as package_version
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
from flask import Flask
from harness import AppClient, Cluster, PgBouncer, Postgres, version
from harness.postgres import parent_folder, postgres_version, query

from loom import db, instances
from loom.config import Config, DatabaseConfig, ServerConfig
from loom.http.application import Application
from loom.routes import create_app
from loom.upkeep import Upkeep


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests that need Java, Node.js, Go or Chromium")
    parser.addoption("--long", action="store_true", help="run the long versions of the fault tests")
    parser.addoption("--seed", type=int, help="seed of the random tests; printed in the header")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:  # before workers of xdist start, which get the same
        config.option.seed = random.SystemRandom().randrange(2**31)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: with what was started


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two processes for each core: tests of clusters and of faults spend most of their time waiting."""
    return min(2 * (os.cpu_count() or 1), 8)


def pytest_report_header(config: pytest.Config) -> list[str]:
    nginx, pgbouncer = version("nginx", "-v"), version("pgbouncer")
    return [
        f"loom: PostgreSQL {postgres_version()}, Python {platform.python_version()},"
        f" gunicorn {package_version('gunicorn')}, nginx {nginx}, pgBouncer {pgbouncer}",
        f"loom: --seed={config.option.seed}{' --long' if config.option.long else ''}",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.all:
        items[:] = [item for item in items if item.get_closest_marker("all") is None]
    if hasattr(config, "workerinput"):  # in a process of xdist: a slow file and a fast one in turn, for an even load
        files = [list(tests) for _, tests in groupby(items, lambda item: item.path)]
        slow = [tests for tests in files if tests[0].path.parent.name in ("cluster", "faults")]
        fast = [tests for tests in files if tests not in slow]
        items[:] = [test for pair in zip_longest(slow, fast, fillvalue=[]) for tests in pair for test in tests]
    if config.option.long:  # the long versions take as long as they are told to
        for item in items:
            if "long" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.timeout(0))


def pytest_collection_finish() -> None:
    gc.freeze()  # the tests that were collected stay: the garbage collector need not visit them again and again


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run's random tests."""
    return request.config.option.seed


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether to run the long version."""
    return request.config.option.long


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path that is short enough for the socket of a server in it; pytest's are too long."""
    path = Path(tempfile.mkdtemp(prefix="loom-test-", dir=parent_folder()))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The session's server, shared by its tests: not to be stopped."""
    server = Postgres()
    yield server
    server.close()


@pytest.fixture
def start_postgres() -> Iterator[Callable[..., Postgres]]:
    """Starts private servers, which the test may stop, kill and freeze. Arguments as Postgres."""
    servers: list[Postgres] = []

    def start(**options: Any) -> Postgres:
        servers.append(Postgres(**options))
        return servers[-1]

    yield start
    for server in reversed(servers):
        server.close()


@pytest.fixture
def own_postgres(start_postgres: Callable[..., Postgres]) -> Postgres:
    """A private server, which the test may stop, kill and freeze."""
    return start_postgres()


@pytest.fixture
def database_name(postgres: Postgres) -> Iterator[str]:
    name = postgres.database()
    yield name
    postgres.drop(name)


@pytest.fixture
def dsn(postgres: Postgres, database_name: str) -> str:
    """The test's own database, with Loom's schema."""
    return postgres.dsn(database_name)


@pytest.fixture
def sql(dsn: str) -> Callable[..., list[tuple[Any, ...]]]:
    """What an operator does in psql: `sql("SELECT ...", parameter)`, each on a connection of its own."""
    return lambda text, *params: query(dsn, text, *params)


@pytest.fixture
def server_age(sql: Callable[..., list[tuple[Any, ...]]], request: pytest.FixtureRequest) -> None:
    """Makes the server seem to have been up for so long, an hour by default, to sessions that begin after this."""
    age = getattr(request, "param", "1 hour")
    start = f"SELECT now() - interval ''{age}''"
    sql(f"CREATE FUNCTION pg_postmaster_start_time() RETURNS timestamptz LANGUAGE sql AS '{start}'")
    (name,) = sql("SELECT current_database()")[0]
    sql(f"ALTER DATABASE {name} SET search_path = public, pg_catalog")


@pytest.fixture
def session(dsn: str) -> Iterator[Callable[[], psycopg2.extensions.connection]]:
    """Opens further sessions, each in a transaction from its first statement on."""
    opened: list[psycopg2.extensions.connection] = []

    def connect() -> psycopg2.extensions.connection:
        opened.append(psycopg2.connect(dsn))
        return opened[-1]

    yield connect
    for conn in opened:
        conn.close()


@pytest.fixture
def database(dsn: str) -> Iterator[db.Database]:
    """An open pool on the test's database, the default of this process.

    Its requests wait longer for locks than others: tests lock rows on purpose while a request waits.
    """
    pool = db.Database(dsn, lock_seconds=4.0)
    pool.open()
    db.configure(pool)
    yield pool
    db.configure(None)
    pool.close()


@pytest.fixture
def instance(database: db.Database) -> Iterator[instances.Instance]:
    """This process in the registry."""
    me = instances.current = instances.Instance(database, {"pid": 1, "port": 8080, "version": "test"})
    me.start()
    yield me
    me.leave()
    instances.current = None


@pytest.fixture
def cleaner(instance: instances.Instance) -> Upkeep:
    """The clean-up of the elected instance, round by round."""
    return Upkeep(Config(), instance)


@pytest.fixture
def config(dsn: str) -> Config:
    """The settings of the application."""
    return Config(database=DatabaseConfig(type="postgres", dsn=dsn), server=ServerConfig(threads=32))


@pytest.fixture(scope="session")
def routes() -> Application:
    """An application whose routes those of the tests share, since it takes 20 ms to register them."""
    return create_app(Config())


@pytest.fixture
def app(routes: Application, config: Config, instance: instances.Instance) -> Flask:
    """The application, served by this process as an instance."""
    app = Application(config)
    for name in ("url_map", "view_functions", "blueprints", "error_handler_spec"):
        setattr(app, name, getattr(routes, name))
    app.add_url_rule = None  # type: ignore[method-assign,assignment]  # a test that adds routes calls create_app
    return app


@pytest.fixture
def client(app: Flask) -> AppClient:
    """Calls the application in this process."""
    return AppClient(app)


@pytest.fixture
def start_cluster(dsn: str) -> Iterator[Callable[..., Cluster]]:
    """Starts clusters on the test's database, or on `dsn=...`. Arguments as Cluster."""
    clusters: list[Cluster] = []

    def start(count: int = 3, **options: Any) -> Cluster:
        clusters.append(Cluster(options.pop("dsn", dsn), count, **options))
        return clusters[-1]

    yield start
    for cluster in reversed(clusters):
        cluster.close()


@pytest.fixture
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Three instances on the test's database."""
    return start_cluster(3)


@pytest.fixture
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    """A pgBouncer in transaction mode before the session's server."""
    bouncer = PgBouncer(postgres)
    yield bouncer
    bouncer.close()
