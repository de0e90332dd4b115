"""The WSGI application, and what it does before and after each view."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from flask import Flask, request
from flask.globals import request_ctx
from flask.wrappers import Request, Response
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.routing import MapAdapter

from loom import db, errors
from loom import instances as registry
from loom.bounds import bounds
from loom.config import Config
from loom.db.connection import REPEATS
from loom.http import metrics, origins, problems, request_log
from loom.http.parse import NameConverter, check_query
from loom.http.pollers import CAN_PARK, PARKED, RECEIVED, WAITER, Pollers, Wait, before_view
from loom.log import this_thread

API = "/api/v1/"
ALWAYS_SERVED = ("/health", "/metrics", "/api/v1/health", "/api/openapi.yaml")


class Application(Flask):
    """Flask with one function before each request and one after it, which it calls directly.

    Loom has no sessions, signals, coroutines or other hooks; Flask's search for them took a tenth of a request's time.
    """

    def __init__(self, config: Config) -> None:
        super().__init__("loom", static_folder=None)
        self.config["MAX_CONTENT_LENGTH"] = bounds.entity
        self.config["LOOM"] = config
        self.url_map.merge_slashes = False  # else /locks//a would lead to the lock "a"
        self.url_map.converters["name"] = NameConverter
        self.pollers = Pollers(config.server.threads)
        problems.register(self)

    def full_dispatch_request(self) -> Response:
        """Relies on the rule that each view and each error handler returns a Response."""
        metrics.start()
        line = request_log.begin(request_ctx.request)
        while True:
            try:
                self.preprocess_request()
                answer = self.dispatch_with_retries()
                break
            except Wait as wait:
                line.wait()
                environ = request.environ
                environ[WAITER] = wait.waiter
                if CAN_PARK in environ:
                    environ[PARKED] = wait
                    return Response()  # not sent: the server runs the request again
                self.pollers.sleep(wait)
            except Exception as exc:
                answer = cast(Response, self.handle_user_exception(exc))
                break
            finally:
                db.end_of_answer()
        return self.process_response(answer)

    def dispatch_with_retries(self) -> Response:
        """Calls the view again after a deadlock or a serialization failure that rolled back everything it had done."""
        view = cast(Callable[[], Response], self.dispatch_request)
        for _ in range(REPEATS):
            try:
                return view()
            except errors.Undone:
                if not db.default().repeatable:
                    raise
        return view()

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        """For routing by path alone: no route depends on the host. Flask's own takes a fifth of a request's time."""
        if request is None:
            return None
        environ = request.environ
        path = environ.get("PATH_INFO", "").encode("latin-1").decode(errors="replace")
        return MapAdapter(self.url_map, "", "/", "", "http", path, environ["REQUEST_METHOD"])

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        return func

    def do_teardown_request(self, exc: BaseException | None = None) -> None:
        this_thread.request_id = None

    def do_teardown_appcontext(self, exc: BaseException | None = None) -> None:
        pass

    @functools.cached_property
    def static_paths(self) -> dict[str, set[str]]:
        """The paths without parameters, and their methods. Such a path is never the id of an entity."""
        found: dict[str, set[str]] = {}
        for rule in self.url_map.iter_rules():
            if not rule.arguments:
                found.setdefault(rule.rule, set()).update(rule.methods or ())
        return found

    def make_default_options_response(self) -> Response:
        answer = super().make_default_options_response()
        if request.path in self.static_paths:
            answer.headers["Allow"] = ", ".join(sorted(self.static_paths[request.path]))
        return answer

    def preprocess_request(self) -> None:
        """Sets the request's deadline, refuses other origins, unknown query parameters and methods.

        Refuses the request if this instance may have been declared dead and cannot confirm that it is registered.
        """
        db.default().start_request(request.environ.pop(RECEIVED, None))
        origins.check_host(request.environ, self.config["LOOM"])
        origins.check(request.environ, self.config["LOOM"])
        before_view()
        methods = self.static_paths.get(request.path)
        if methods is not None and request.method not in methods:
            raise MethodNotAllowed(sorted(methods))
        if request.query_string and request.endpoint and request.method != "OPTIONS" and request.path.startswith(API):
            check_query(self.view_functions[request.endpoint])
        me = registry.current
        if me is not None and not me.fresh and not request.path.startswith(ALWAYS_SERVED):
            me.confirm()

    def process_response(self, response: Response) -> Response:
        metrics.count(response.status_code)
        request_log.end(request_ctx.request, response)
        origins.add_headers(response, request.environ, self.config["LOOM"])
        if response.is_sequence and not any(cast(list[bytes], response.response)):
            response.headers.pop("Content-Type", None)  # of nothing
        return response
