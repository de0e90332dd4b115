"""The calls of logs, of the use of models, and of API keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loom.client.base import V1, Base, path_of
from loom.client.values import Json


class Administration(Base):
    """Logs, what models have cost, and API keys, for which the role admin is needed."""

    def list_logs(self, **filters: Any) -> Iterator[Json]:
        """Requests of all instances and uses of models, newest first. Filters as in the contract, such as `since`."""
        return self.rows(f"{V1}/logs", **filters)

    def list_recent_logs(self, **filters: Any) -> list[Json]:
        """The latest as lines of a log: `limit`, `since`, `until`, `source`, `level` ..."""
        return self.send("GET", f"{V1}/logs/recent", query=filters).json["logs"]

    def report_usage(self, provider_id: str, **usage: Any) -> Json:
        """The use of a model: `model_name`, `user_id`, `prompt_tokens`, `completion_tokens`, `cost_usd` ..."""
        return self.send("POST", f"{V1}/logs", body={"provider_id": provider_id, **usage}, once=True).json

    def list_usage(self, **filters: Any) -> list[Json]:
        """The latest 100 uses of models: `provider_id`, `start_time`, `end_time`."""
        return self.send("GET", f"{V1}/analytics/logs", query=filters).json

    def get_usage_stats(self, **filters: Any) -> Json:
        """Totals of the uses: `start_time`, `end_time`, `user_id`, `group_by`."""
        return self.send("GET", f"{V1}/analytics/stats", query=filters).json

    def get_costs(self, **filters: Any) -> Json:
        """What the uses have cost: filters as for the totals."""
        return self.send("GET", f"{V1}/analytics/costs", query=filters).json

    def export_usage(self, **filters: Any) -> bytes:
        """All uses as a file: `format` is csv or json."""
        return self.send("GET", f"{V1}/analytics/export", query=filters).body

    def list_keys(self) -> Iterator[Json]:
        return self.rows(f"{V1}/keys")

    def get_key(self, key_id: str) -> Json:
        return self.send("GET", path_of("keys", key_id)).json

    def create_key(self, principal: str, role: str, **more: Any) -> Json:
        """The answer has the `key`, for the only time. `role`: reader, agent or admin; `note`, `expires_in_seconds`."""
        return self.send("POST", f"{V1}/keys", body={"principal": principal, "role": role, **more}).json

    def rotate_key(self, key_id: str, **more: Any) -> Json:
        """Another key of the same principal; the old one is valid for `overlap_seconds` more."""
        return self.send("POST", path_of("keys", key_id, "rotate"), body=more).json

    def revoke_key(self, key_id: str) -> None:
        self.delete(path_of("keys", key_id))
