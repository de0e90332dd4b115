"""The kinds of rows that can be imported: their tables, and the columns that a source gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# The key in `attributes` of what a source says and Loom cannot hold in its place, such as an assignee that is gone.
KEPT = "loom_import"


@dataclass(frozen=True)
class Kind:
    """`references` may lead to rows that come later; they are settled when all have been read. `parent` is one."""

    name: str
    table: str
    columns: tuple[str, ...]
    references: tuple[str, ...] = ()
    parent: str | None = None
    key: str = "id"
    objects: tuple[str, ...] = ()  # columns of JSON
    numbers: tuple[str, ...] = ()  # columns of double precision
    versioned: bool = True  # shared state, with versions and events
    derived: Mapping[str, str] = field(default_factory=dict)  # columns that no source has, in SQL

    @property
    def staged(self) -> str:
        return f"staged_{self.table}"

    @property
    def kept(self) -> bool:
        return "attributes" in self.columns

    @property
    def compared(self) -> tuple[str, ...]:
        """The columns of the digest: as the source has them."""
        return tuple(column for column in self.columns if column not in self.references)


PROVIDER = Kind(
    "provider",
    "providers",
    (
        *("id", "name", "type", "endpoint", "model", "configured_model", "selected_model", "selection_reason"),
        *("model_score", "selected_gpu", "gpu_constraints", "description", "requires_key", "key_id", "owner_id"),
        *("is_shared", "status", "last_heartbeat_at", "last_heartbeat_latency_ms", "last_heartbeat_error"),
        *("cost_per_mtoken", "context_window", "supports_function", "supports_vision", "supports_streaming", "tags"),
        *("metrics", "attributes", "created_at", "updated_at"),
    ),
    objects=("gpu_constraints", "metrics", "attributes"),
    numbers=("model_score", "cost_per_mtoken"),
)
PROJECT = Kind(
    "project",
    "projects",
    (
        *("id", "name", "description", "git_repo", "branch", "beads_path", "bead_prefix", "parent_id"),
        *("is_perpetual", "is_sticky", "git_strategy", "status", "context", "due_date", "closed_at", "attributes"),
        *("created_at", "updated_at"),
    ),
    references=("parent_id",),
    parent="parent_id",
    objects=("context", "attributes"),
)
AGENT = Kind(
    "agent",
    "agents",
    (
        *("id", "name", "role", "persona_name", "provider_id", "status", "current_bead", "project_id"),
        *("position_id", "attributes", "started_at", "last_active", "created_at", "updated_at"),
    ),
    references=("provider_id", "project_id"),
    objects=("attributes",),
)
CONFIG = Kind(
    "config",
    "config",
    ("key", "value", "updated_by", "created_at", "updated_at"),
    key="key",
    objects=("value",),
)
BEAD = Kind(
    "bead",
    "beads",
    (
        *("id", "type", "title", "description", "status", "priority", "project_id", "assigned_to", "parent"),
        *("blocked_by", "related_to", "tags", "context", "attributes", "due_date", "estimated_time", "milestone_id"),
        *("close_reason", "closed_at", "created_at", "updated_at"),
    ),
    references=("status", "project_id", "assigned_to", "parent", "blocked_by"),
    parent="parent",
    objects=("context", "attributes"),
)
COMMENT = Kind(
    "comment",
    "comments",
    (
        *("id", "entity_type", "entity_id", "parent_id", "author_id", "author_username", "content"),
        *("created_at", "updated_at"),
    ),
    references=("parent_id",),
    parent="parent_id",
    derived={
        "project_id": """
            COALESCE((SELECT project_id FROM staged_beads WHERE id = s.entity_id),
                     (SELECT project_id FROM beads WHERE id = s.entity_id))
            """
    },
)
REQUEST_LOG = Kind(
    "request_log",
    "request_logs",
    (
        *("id", "timestamp", "user_id", "method", "path", "provider_id", "model_name", "prompt_tokens"),
        *("completion_tokens", "latency_ms", "status_code", "cost_usd", "error_message", "metadata"),
    ),
    objects=("metadata",),
    numbers=("latency_ms",),
    versioned=False,
)
# In the order in which they are written: each refers to those before it.
KINDS = (PROVIDER, PROJECT, AGENT, CONFIG, BEAD, COMMENT, REQUEST_LOG)
