"""Who exchanges with whom, and when: pure.

In a turn each node, or each rank of a node, has one partner; partners differ from turn to turn, so
the best rate that a node reaches is not spoilt by one slow partner. However many nodes there are,
there are a few turns only (``trace.links``).

Nodes may be containers on one machine. They would take cores from each other, so of such nodes one
works at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..topology import Topology
from ..trace.links import partner, turns

Pair = tuple[int, int]  # ranks


def shifts(machines: Sequence[str]) -> list[int]:
    """For each node when it may work: nodes of one machine have different numbers from 0 on."""
    seen: dict[str, int] = {}
    found = []
    for machine in machines:
        found.append(seen.get(machine, 0))
        seen[machine] = found[-1] + 1
    return found


def in_nodes(topology: Topology, machines: Sequence[str]) -> list[list[Pair]]:
    """Waves of pairs of ranks that share a node; the pairs of a wave exchange at once."""
    shift = shifts(machines)
    most = max((turns(len(ranks)) for ranks in topology.nodes if len(ranks) > 1), default=0)
    waves: list[list[Pair]] = []
    for turn in range(most):
        parts: list[list[Pair]] = [[] for _ in range(max(shift) + 1)]
        for ranks, at in zip(topology.nodes, shift, strict=True):
            if turn < turns(len(ranks)):
                parts[at] += [(ranks[low], ranks[high]) for low, high in _pairs(len(ranks), turn)]
        waves += [part for part in parts if part]
    return waves


def between_nodes(topology: Topology, machines: Sequence[str]) -> list[list[Pair]]:
    """Waves of pairs of the nodes' first ranks; a machine is in one pair of a wave at most."""
    nodes = topology.node_count
    if nodes < 2:
        return []
    waves: list[list[Pair]] = []
    for turn in range(turns(nodes)):
        parts: list[tuple[set[str], list[Pair]]] = []
        for low, high in _pairs(nodes, turn):
            users = {machines[low], machines[high]}
            place = next((part for part in parts if not part[0] & users), None)
            if place is None:
                place = (set(), [])
                parts.append(place)
            place[0].update(users)
            place[1].append((topology.nodes[low][0], topology.nodes[high][0]))
        waves += [pairs for _, pairs in parts]
    return waves


def _pairs(count: int, turn: int) -> list[tuple[int, int]]:
    found = []
    for each in range(count):
        other = partner(each, count, turn)
        if other is not None and each < other:
            found.append((each, other))
    return found
