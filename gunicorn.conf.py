"""gunicorn's settings. Read by `gunicorn app:app` here, and by `loom serve`. What users set is in config.yaml."""

from loom import instances, log, upkeep
from loom.bounds import bounds
from loom.http import siblings
from loom.server import hooks
from loom.state import request_rows

settings, logconfig_dict, dsn = hooks.read_settings()

host = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
bind = f"{host}:{settings.server.http_port}"
wsgi_app = "loom.routes:create_app()"  # not app:app: another app.py may be in the working folder
worker_class = "loom.server.worker.Worker"
workers = settings.server.workers
threads = settings.server.threads

worker_connections = bounds.connections
keepalive = 75  # seconds; above nginx's 1, so that nginx closes idle connections first
# From SIGTERM to SIGKILL; systemd's TimeoutStopSec is above it.
graceful_timeout = 20 + int(settings.server.drain_seconds)
timeout = 30  # for a worker whose main thread is stuck; requests have their own time limits
limit_request_line = 8190  # a name of 255 characters of four bytes takes 3060, percent-encoded; the rest is for a query
forwarder_headers = ""  # no header may change SCRIPT_NAME or PATH_INFO, and so the name of a lock
control_socket_disable = True  # two gunicorns of one user would share it
logger_class = "loom.server.worker.Logger"


def pre_fork(server, worker):
    worker.drain_seconds = settings.server.drain_seconds
    hooks.before_fork(worker, dsn)
    worker.before_fork()


def post_fork(server, worker):
    log.start_threads()
    worker.cfg.set("graceful_timeout", 17)  # the worker's own: it must leave the registry before the master's SIGKILL
    instance = hooks.after_fork(worker, settings)
    worker.upkeep = upkeep.Upkeep(settings, instance)
    worker.upkeep.start()
    worker.request_rows = request_rows.start(instance.database, lambda: instance.shared.over(settings))


def post_worker_init(worker):
    worker.check_serving()
    hooks.after_load(worker)


def worker_exit(server, worker):
    if hasattr(worker, "upkeep"):
        worker.upkeep.stop()
        worker.request_rows.stop()
    instances.leave()


def child_exit(server, worker):
    hooks.child_died(worker)


def on_exit(server):
    siblings.remove_folder()
