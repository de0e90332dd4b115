"""The kinds of shared state, for tests that hold for all of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from harness.client import Methods
from harness.work import AGENTS, BEADS, PROJECT, make

PROVIDERS = "/api/v1/providers"
PROJECTS = "/api/v1/projects"


class Kind(NamedTuple):
    """`path` of the entity "x", `new`: the body that creates it; `text` and `other` name two fields that hold text."""

    name: str
    path: str
    new: dict[str, Any]
    text: str
    other: str

    def ignores(self, method: str, field: str, value: Any) -> bool:
        """Whether this says nothing, as in the original: null where none can be, an empty name of what gets one."""
        originals = ("POST", "PATCH" if self.name == "bead" else "PUT")
        return method in originals and (
            value is None or ((field, value) == ("name", "") and self.name in ("agent", "provider"))
        )

    @property
    def list(self) -> str:
        return self.path.rpartition("/")[0]


KINDS = [
    Kind("provider", PROVIDERS + "/x", {"id": "x", "name": "n"}, "model", "endpoint"),
    Kind(
        "project", PROJECTS + "/x", {"id": "x", "name": "n", "git_repo": "r", "branch": "b"}, "description", "work_dir"
    ),
    Kind("agent", AGENTS + "/x", {"id": "x", "persona_name": "w", "project_id": PROJECT}, "role", "name"),
    Kind("bead", BEADS + "/x", {"id": "x", "title": "t", "project_id": PROJECT}, "title", "description"),
]


def entity(client: Methods, kind: Kind) -> dict[str, Any]:
    """Create the entity "x", and the project that it belongs to."""
    if kind.name != "project":
        client.post(PROJECTS, {"id": PROJECT, "name": "p", "git_repo": "r", "branch": "b"})
    return make(client, kind.list, **kind.new)
