"""Which links must go so that nothing waits for itself: in memory, since they are only pairs of numbers."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

_NEW, _OPEN, _DONE = 0, 1, 2


def closing_edges(edges: Iterable[tuple[int, int]], nodes: int) -> Iterator[list[int]]:
    """Each cycle that is left when the ones before it are opened: its nodes, of which the last leads to the first.

    edges: sorted. Without the edge from the last to the first node of each, there is no cycle.
    """
    first, targets = array("l", [0]) * (nodes + 1), array("l")
    for start, end in edges:
        first[start + 1] += 1
        targets.append(end)
    for node in range(nodes):
        first[node + 1] += first[node]
    following, state, place = first[:], bytearray(nodes), array("l", [0]) * nodes
    for root in range(nodes):
        if state[root] != _NEW:
            continue
        path = [root]
        state[root] = _OPEN
        while path:
            node = path[-1]
            if following[node] == first[node + 1]:
                state[node] = _DONE
                path.pop()
                continue
            target = targets[following[node]]
            following[node] += 1
            if state[target] == _OPEN:
                yield path[place[target] :]
            elif state[target] == _NEW:
                state[target] = _OPEN
                place[target] = len(path)
                path.append(target)
