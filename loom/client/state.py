"""The calls of shared state: beads in bulk, comments, projects, settings; instances and health."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from loom.client.base import V1, Base, conditions, given, path_of
from loom.client.values import Event, Json, of_json

_AT_ONCE = threading.Event()
_AT_ONCE.set()


class State(Base):
    """What the kinds of shared state have besides their common calls; settings, instances, health."""

    def get_work_graph(self, *, project_id: str | None = None) -> Json:
        """`beads` by id, and `edges`, of all pages."""
        graph: Json = {"beads": {}, "edges": []}
        for page in self.pages(f"{V1}/work-graph", project_id=project_id):
            graph["beads"] |= page["beads"]
            graph["edges"] += page["edges"]
        return graph

    def create_beads(self, beads: Sequence[Json], **more: Any) -> list[Json]:
        """Up to 1,000 beads, all or none. A `ref` names a bead for the others of the same call."""
        return self.send("POST", f"{V1}/beads/bulk", body={"beads": list(beads)}, once=True, **more).json

    def list_bead_comments(self, bead_id: str) -> Iterator[Json]:
        return (row for page in self.pages(path_of("beads", bead_id, "comments")) for row in page["comments"])

    def comment_on_bead(self, bead_id: str, content: str, *, parent_id: str | None = None, **more: Any) -> Json:
        body = given(content=content, parent_id=parent_id)
        return self.send("POST", path_of("beads", bead_id, "comments"), body=body, once=True, **more).json

    def list_project_comments(self, project_id: str) -> Iterator[Json]:
        return self.rows(path_of("projects", project_id, "comments"))

    def comment_on_project(self, project_id: str, author_id: str, comment: str, **more: Any) -> Json:
        body = {"author_id": author_id, "comment": comment}
        return self.send("POST", path_of("projects", project_id, "comments"), body=body, once=True, **more).json

    def close_project(self, project_id: str, author_id: str, *, comment: str | None = None) -> Json:
        """Raises Conflict, with `readiness_issues`."""
        body = given(author_id=author_id, comment=comment)
        return self.send("POST", path_of("projects", project_id, "close"), body=body, once=True).json

    def reopen_project(self, project_id: str, author_id: str, *, comment: str | None = None) -> Json:
        body = given(author_id=author_id, comment=comment)
        return self.send("POST", path_of("projects", project_id, "reopen"), body=body, once=True).json

    def get_project_state(self, project_id: str) -> Json:
        return self.send("GET", path_of("projects", project_id, "state")).json

    def assign_agent(self, project_id: str, agent_id: str, *, action: str = "assign") -> Json:
        """`action`: assign or unassign."""
        body = {"agent_id": agent_id, "action": action}
        return self.send("POST", path_of("projects", project_id, "agents"), body=body, once=True).json

    def list_provider_models(self, provider_id: str) -> list[str]:
        return [model["id"] for model in self.send("GET", path_of("providers", provider_id, "models")).json["models"]]

    def get_config(self) -> Json:
        return self.send("GET", f"{V1}/config").json

    def put_config(self, snapshot: Json, **more: Any) -> Json:
        return self.send("PUT", f"{V1}/config", body=snapshot, **more).json

    def export_config(self) -> str:
        return self.send("GET", f"{V1}/config/export.yaml").body.decode()

    def import_config(self, text: str, **more: Any) -> Json:
        return self.send("POST", f"{V1}/config/import.yaml", body=text.encode(), once=True, **more).json

    def get_config_value(self, key: str) -> Json:
        """The shared setting, with its `value` and `version`. Raises NotFound."""
        return self.send("GET", path_of("config", key)).json

    def put_config_value(self, key: str, value: Any, *, if_match: int | str | None = None, **more: Any) -> Json:
        headers = conditions(if_match)
        return self.send("PUT", path_of("config", key), body={"value": value}, headers=headers, **more).json

    def delete_config_value(self, key: str, *, if_match: int | str | None = None, **more: Any) -> None:
        self.delete(path_of("config", key), headers=conditions(if_match), **more)

    def get_config_value_history(self, key: str) -> Iterator[Event]:
        return (of_json(Event, row) for row in self.rows(path_of("config", key, "history")))

    def list_instances(self) -> Iterator[Json]:
        return self.rows(f"{V1}/instances")

    def get_instance(self, instance_id: str) -> Json:
        return self.send("GET", path_of("instances", instance_id)).json

    def get_health(self) -> Json:
        """Of one instance. Without a database it is an answer, too: `healthy` is false."""
        answer = self.transport.call("GET", "/health", stop=_AT_ONCE)
        if answer.status not in (200, 503):
            raise answer.error()
        return answer.json

    def get_metrics(self) -> str:
        return self.send("GET", "/metrics").body.decode()

    def get_contract(self) -> str:
        return self.send("GET", "/api/openapi.yaml").body.decode()
