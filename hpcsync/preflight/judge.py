"""Which nodes to name: pure.

A node is compared with the median of all nodes; in what its ranks share, of those with as many
ranks. What counts of its ranks is the slowest, since the
others wait for it; of its links the best, since a slow partner is not its fault. So of two nodes,
whose link is one, neither can be named for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from ..topology import Topology
from .compute import Rates
from .survey import Level
from .wire import Fault

_LATE, _LATE_S = 4.0, 20e-6  # times the median and seconds above it that a latency is too long
_FEWEST_FOR_LINKS = 3  # nodes


@dataclass(frozen=True, slots=True)
class NodeFound:
    """One node; None where nothing was measured.

    Attributes:
        product, memory: of its slowest rank, operations and bytes a second.
        inside: its slowest pair of ranks, bytes a second each way.
        link, latency_s: the best of its pairs with other nodes.
        product_rank, memory_rank: which rank that was.
    """

    name: str
    ranks: tuple[int, ...]
    product: float
    memory: float
    product_rank: int
    memory_rank: int
    inside: float | None = None
    link: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, slots=True)
class Slow:
    """A node that is worse than the others.

    Attributes:
        what: product, memory, inside, link or latency.
        share: of the median; for latency a multiple.
        rank: whose it is, if it is a rank's.
    """

    node: int
    what: str
    value: float
    share: float
    rank: int | None = None


def nodes_of(
    topology: Topology,
    names: Sequence[str],
    rates: Sequence[Rates],
    inside: Level,
    between: Level,
) -> list[NodeFound]:
    """What was measured, by node."""
    inner: dict[int, list[float]] = {}
    for pair in inside.pairs:
        inner.setdefault(topology.node_of(pair.low), []).append(pair.rate)
    links: dict[int, list[tuple[float, float]]] = {}
    for pair in between.pairs:
        for rank in (pair.low, pair.high):
            links.setdefault(topology.node_of(rank), []).append((pair.rate, pair.latency_s))
    found = []
    for node, ranks in enumerate(topology.nodes):
        slowest = min(ranks, key=lambda rank: rates[rank].product)
        narrowest = min(ranks, key=lambda rank: rates[rank].memory)
        own = links.get(node, [])
        found.append(
            NodeFound(
                name=names[node],
                ranks=ranks,
                product=rates[slowest].product,
                memory=rates[narrowest].memory,
                product_rank=slowest,
                memory_rank=narrowest,
                inside=min(inner.get(node, []), default=None),
                link=max((rate for rate, _ in own), default=None),
                latency_s=min((latency for _, latency in own), default=None),
            )
        )
    return found


def slow_nodes(nodes: Sequence[NodeFound], share: float) -> list[Slow]:
    """Nodes below ``share`` of the median in something, by node."""
    found: list[Slow] = []
    for what in ("product", "memory", "inside", "link"):
        if what == "link" and len(nodes) < _FEWEST_FOR_LINKS:
            continue
        for known in _alike(nodes, what):
            middle = median(known.values())
            for at, value in known.items():
                if value < share * middle:
                    rank = getattr(nodes[at], f"{what}_rank", None)
                    found.append(Slow(at, what, value, value / middle, rank))
    late = {at: node.latency_s for at, node in enumerate(nodes) if node.latency_s is not None}
    if len(late) >= _FEWEST_FOR_LINKS:
        middle = median(late.values())
        found += [
            Slow(at, "latency", value, value / middle)
            for at, value in late.items()
            if value > _LATE * middle and value > middle + _LATE_S
        ]
    return sorted(found, key=lambda slow: slow.node)


def best_of(looks: Sequence[Sequence[Rates]]) -> list[Rates]:
    """The best of each rank."""
    best = list(looks[0])
    for rates in looks[1:]:
        best = [now.better(then) for now, then in zip(rates, best, strict=True)]
    return best


def lasting(slow: Sequence[Slow], looks: Sequence[Sequence[Slow]]) -> list[Slow]:
    """Those that each look found too, of what ranks compute and move.

    The best of one look and the best of another must not be compared: a memory that others use as
    well, as nodes on one machine do, is faster in one than in the other.
    """
    found = list(slow)
    for each in looks:
        seen = {(known.node, known.what) for known in each}
        found = [one for one in found if one.rank is None or (one.node, one.what) in seen]
    return found


def _alike(nodes: Sequence[NodeFound], what: str) -> list[dict[int, float]]:
    """Values by node, for each group of nodes that may be compared: two of them or more."""
    groups: dict[int, dict[int, float]] = {}
    for at, node in enumerate(nodes):
        value = getattr(node, what)
        if value is not None:
            ranks = 0 if what == "link" else len(node.ranks)
            groups.setdefault(ranks, {})[at] = value
    return [known for known in groups.values() if len(known) > 1]


def odd_products(rates: Sequence[Rates]) -> list[Rates]:
    """The same, with a wrong product more where its bits are not those of most ranks.

    All ranks of a kind multiply the same matrices. Where no value has a majority, none is right.
    """
    kinds: dict[str, Counter[int]] = {}
    for each in rates:
        kinds.setdefault(each.kind, Counter())[each.checksum] += 1
    found = []
    for each in rates:
        seen = kinds[each.kind]
        odd = 2 * seen[each.checksum] <= seen.total() and len(seen) > 1
        found.append(replace(each, wrong=each.wrong + odd))
    return found


def slow_pairs(topology: Topology, between: Level, share: float) -> list[tuple[int, int, float]]:
    """(node, node, share of the median) of slow links between nodes that have better ones."""
    if not between.pairs:
        return []
    middle = median(pair.rate for pair in between.pairs)
    best: dict[int, float] = {}
    for pair in between.pairs:
        for rank in (pair.low, pair.high):
            node = topology.node_of(rank)
            best[node] = max(best.get(node, 0.0), pair.rate)
    found = []
    for pair in between.pairs:
        low, high = topology.node_of(pair.low), topology.node_of(pair.high)
        slow = pair.rate < share * middle
        if slow and min(best[low], best[high]) >= share * middle:
            found.append((low, high, pair.rate / middle))
    return found


def wrong_nodes(topology: Topology, faults: Sequence[Fault], rates: Sequence[Rates]) -> list[int]:
    """Nodes that compute or transfer wrong.

    Of a wrong transfer it is not known which end did it: nodes are named that explain all of them,
    the one with the most first, and both ends where that does not tell.
    """
    named = {topology.node_of(rank) for rank, each in enumerate(rates) if each.wrong}
    named |= {topology.node_of(each.sender) for each in faults if each.late}
    rest = [(topology.node_of(each.sender), topology.node_of(each.receiver)) for each in faults]
    while rest := [ends for ends in rest if not named & set(ends)]:
        partners: dict[int, set[int]] = {}
        for ends in rest:
            for node in ends:
                partners.setdefault(node, set()).update(set(ends) - {node})
        # Many partners speak against a node more than many errors with one of them.
        counts = Counter({node: len(others) for node, others in partners.items()})
        most = max(counts.values())
        named |= {node for node, count in counts.items() if count == most}
    return sorted(named)
