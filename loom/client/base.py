"""What all calls share: sending, pages, deletions, conditions; and the calls that each kind of entity has."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from loom.client import errors
from loom.client.transport import Answer, Transport
from loom.client.values import Event, Fence, Json, of_json

V1 = "/api/v1"
ANY = "*"  # as a condition: whatever version there is


def path_of(*parts: str) -> str:
    return "/".join((V1, *(quote(part, safe="") for part in parts)))


def given(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def conditions(if_match: int | str | None, if_none_match: int | str | None = None, merge: bool = False) -> Json:
    def tag(version: int | str | None) -> str | None:
        return f'"{version}"' if isinstance(version, int) else version

    headers = {"If-Match": tag(if_match), "If-None-Match": tag(if_none_match)}
    return given(**headers, Prefer="conflict=merge" if merge else None)


class Base:
    """Each call is sent until it is answered, within `timeout` seconds, and done once.

    A refusal raises the class of its problem (`loom.client.errors`), and no answer in time raises Unreachable.
    Lists follow their pages. `fences` of a write: grants or claims that must hold, else LockLost.
    """

    def __init__(
        self,
        servers: str | Sequence[str] = "http://localhost:8080",
        *,
        api_key: str | None = None,
        actor: str | None = None,
        timeout: float = 30.0,
        attempt_timeout: float = 8.0,
        **options: Any,
    ) -> None:
        """`servers`: nginx's URL, or those of several instances, of which any answers.

        `actor`: who writes, for the events. `attempt_timeout`: seconds after which the next server is asked; an
        instance answers within 5 s, besides the wait that a request asks for. `options` are urllib3's, for TLS.
        """
        headers = given(**{"X-API-Key": api_key, "Loom-Actor": actor and actor.encode().decode("latin-1")})
        urls = servers.replace(",", " ").split() if isinstance(servers, str) else servers
        self.transport = Transport(urls, headers, timeout, attempt_timeout, **options)
        self.projects, self.providers = Kind(self, "projects"), Kind(self, "providers")
        self.agents, self.beads = Kind(self, "agents"), Kind(self, "beads")

    def close(self) -> None:
        """Close the kept connections."""
        self.transport.close()

    def send(
        self,
        method: str,
        path: str,
        *,
        once: bool = False,
        fences: Sequence[Fence] = (),
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Answer:
        """Any request. `once`: it needs a key to be done once. `more` as Transport.call.

        Raises Problem, Unreachable.
        """
        sent = dict(headers or {})
        if fences:
            sent["Loom-Lock-Token"] = ", ".join(
                f'{fence.fencing_token}; lock="{quote(fence.lock_name, safe="")}"' for fence in fences
            )
        answer = self.transport.call(method, path, headers=sent, key=str(uuid.uuid4()) if once else None, **more)
        if answer.status >= 400:
            raise answer.error()
        return answer

    def pages(self, path: str, **query: Any) -> Iterator[Any]:
        """The answer of each page."""
        given: Mapping[str, Any] | None = query
        while True:
            answer = self.send("GET", path, query=given)
            yield answer.json
            link = re.search(r'<([^>]*)>; rel="next"', answer.headers.get("Link", ""))
            if link is None:
                return
            path, given = re.sub("^https?://[^/]*", "", link[1]), None

    def rows(self, path: str, **query: Any) -> Iterator[Json]:
        for page in self.pages(path, **query):
            yield from page

    def delete(self, path: str, **more: Any) -> None:
        """A thing that is gone when the call is repeated is deleted by it."""
        try:
            self.send("DELETE", path, **more)
        except errors.NotFound as exc:
            if not exc.retried:
                raise


class Kind:
    """The projects, providers, agents or beads. Conditions are versions, or ANY; if one is not met: Stale."""

    def __init__(self, calls: Base, word: str) -> None:
        self._calls, self._word = calls, word

    def list(self, **filters: str | Sequence[str] | None) -> Iterator[Json]:
        """In the order of their ids. Filters as in the contract; several values are alternatives."""
        query = {name: value if isinstance(value, str) else ",".join(value) for name, value in filters.items() if value}
        return self._calls.rows(path_of(self._word), **query)

    def create(self, *, if_none_match: str | None = None, fences: Sequence[Fence] = (), **fields: Any) -> Json:
        """Without an `id` it gets one. Raises Taken if the id is in use."""
        headers = conditions(None, if_none_match)
        return self._calls.send(
            "POST", path_of(self._word), body=fields, once=True, headers=headers, fences=fences
        ).json

    def ensure(self, id: str, **fields: Any) -> Json:
        """The one with this id; created with these fields if there is none."""
        try:
            return self.create(id=id, if_none_match=ANY, **fields)
        except (errors.Taken, errors.Stale):
            return self.get(id)

    def get(self, id: str) -> Json:
        return self._calls.send("GET", path_of(self._word, id)).json

    def patch(
        self,
        id: str,
        *,
        if_match: int | str | None = None,
        merge: bool = False,
        fences: Sequence[Fence] = (),
        **fields: Any,
    ) -> Json:
        """Change these fields: objects are merged, lists replaced, None clears. `merge`: also in a newer version, if
        nobody else has changed the same fields since."""
        headers = conditions(if_match, merge=merge)
        return self._calls.send("PATCH", path_of(self._word, id), body=fields, headers=headers, fences=fences).json

    def put(self, id: str, *, if_match: int | str | None = None, fences: Sequence[Fence] = (), **fields: Any) -> Json:
        """As `patch`, but objects are replaced."""
        headers = conditions(if_match)
        return self._calls.send("PUT", path_of(self._word, id), body=fields, headers=headers, fences=fences).json

    def delete(self, id: str, *, if_match: int | str | None = None, fences: Sequence[Fence] = ()) -> None:
        self._calls.delete(path_of(self._word, id), headers=conditions(if_match), fences=fences)

    def history(self, id: str) -> Iterator[Event]:
        """One event for each version, newest first."""
        return (of_json(Event, row) for row in self._calls.rows(path_of(self._word, id, "history")))
