"""How far a client can make something grow: one place for all bounds."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Bounds:
    """Sizes are in bytes; all other bounds are numbers of things.

    bound() in loom/sql/pages.sql has those that the database checks; a test compares them.
    """

    entity: int = MIB  # as it is stored and answered, after merging; also a body
    bulk: int = 1000  # beads of one request
    import_yaml: int = 5 * MIB
    request: int = 5 * MIB  # a body that the worker reads, whatever the route
    values: int = 100_000  # in the JSON or YAML of a body: each takes up to 100 bytes of memory
    depth: int = 100  # levels of nested JSON
    references: int = 1000  # ids or tags in a list
    dependants: int = 10_000  # beads that wait for one bead, and children of one
    graph: int = 50_000  # beads that a check for cycles visits, in both directions
    names: int = 200  # automatic locks of one change; each takes a place in a table that all transactions share
    filter: int = 100  # values of one filter
    page: int = 10_000  # rows
    page_bytes: int = 8 * MIB
    events: int = 1000  # of a page
    lock_metadata: int = 8 * KIB
    shared_value: int = 64 * KIB
    shared_values: int = MIB  # together
    shared_keys: int = 1000
    waiting: int = 2500  # requests of an instance that wait for locks, and as many for events
    waiting_of_key: int = 500  # of these, with keys of one principal
    connections: int = 6000  # of clients to an instance
    buffered: int = 64 * MIB  # of all incomplete requests and unread responses of an instance


bounds = Bounds()
