"""A collective over nodes: reduce-scatter in the node, sum along the rails, allgather in the node.

    node   ranks of one host: each ends with the node's sum of one shard
    rail   ranks of equal local index, one a node: they sum their shard over the nodes
    node   each gives its finished shard to the others

So a node's link carries the buffer once each way, however many ranks the node has.

There are as many rails as the smallest node has ranks. Where nodes are uneven only the first so
many ranks of each node own a shard, which the direct algorithm can do; the others give all they
have and get the sum back.

A level's chunks cut what the level before left to the rank: the node cuts the buffer, the rail
cuts the shard. `flatten` writes the same down as one schedule over all ranks, for `verify` and
`cost`.

Jia et al., Highly Scalable Deep Learning Training System with Mixed-Precision, arXiv:1807.11205,
2018 (hierarchical allreduce), with every rank of a node, not its leader alone, on a rail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcsync.schedules import build
from hpcsync.schedules.base import Kind, Schedule, Step, Transfer

NAME = "hierarchical"

Nodes = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Level:
    """One part of the composition: `schedule` counts ranks by their place in `group`."""

    name: str
    group: tuple[int, ...]
    schedule: Schedule


def compose(
    nodes: Nodes,
    rank: int,
    kind: Kind = Kind.ALLREDUCE,
    *,
    node: str = "direct",
    rail: str = "direct",
) -> tuple[Level, ...]:
    """The levels named "node" and "rail" that `rank` takes part in, in order.

    `nodes` holds the ranks of each node; `node` and `rail` name the algorithms. Levels of one rank
    are left out, and so is the rail for a rank that owns no shard. Raises ValueError: `nodes` do
    not hold each rank once, or differ in size where `node` is not the direct algorithm.
    """
    return _Place(nodes, rank, node, rail).levels(kind)


def flatten(
    nodes: Nodes,
    rank: int,
    kind: Kind = Kind.ALLREDUCE,
    *,
    node: str = "direct",
    rail: str = "direct",
) -> Schedule:
    """The composition of `rank` as one schedule over the ranks of all nodes.

    Arguments and errors as for `compose`; the native algorithm has no steps to flatten. Where
    nodes do not ascend along a rail, receives are put into ascending order of rank, so that sums
    of three and more are added in another order than along the rail.
    """
    place = _Place(nodes, rank, node, rail)
    if "native" in (node, rail):
        raise ValueError("the native algorithm has no steps to flatten")
    shards = place.inside(Kind.REDUCE_SCATTER).schedule
    parts = place.parts(kind)
    steps: list[Step] = []
    owned = (0, 0)
    if place.group:
        base, own = shards.owned[0] * parts, place.across(kind).schedule.owned
        owned = (base + own[0], base + own[1])
    for level in place.levels(kind):
        base, scale = (0, parts) if level.name == "node" else (shards.owned[0] * parts, 1)
        steps += [_globally(step, level.group, base, scale) for step in level.schedule.steps]
    if kind is Kind.ALLREDUCE:
        owned = (0, shards.chunks * parts)
    size = sum(map(len, nodes))
    return Schedule(NAME, kind, rank, size, shards.chunks * parts, tuple(steps), owned)


def _globally(step: Step, group: tuple[int, ...], base: int, scale: int) -> Step:
    def convert(transfers: tuple[Transfer, ...]) -> list[Transfer]:
        return [
            Transfer(group[one.peer], base + one.lo * scale, base + one.hi * scale)
            for one in transfers
        ]

    recvs = sorted(convert(step.recvs), key=lambda one: one.peer)
    return Step(tuple(convert(step.sends)), tuple(recvs), step.action)


class _Place:
    """Where a rank stands among the nodes, and what it runs there."""

    def __init__(self, nodes: Nodes, rank: int, node: str, rail: str) -> None:
        if sorted(one for ranks in nodes for one in ranks) != list(range(sum(map(len, nodes)))):
            raise ValueError(f"nodes {nodes} do not hold each rank once")
        sizes = {len(ranks) for ranks in nodes}
        if len(sizes) > 1 and node != "direct":
            raise ValueError(f"nodes of {sorted(sizes)} ranks need the direct algorithm: {node}")
        homes = [index for index, ranks in enumerate(nodes) if rank in ranks]
        if not homes:
            raise ValueError(f"rank {rank} is on none of the nodes {nodes}")
        self.home = homes[0]
        self.members = tuple(nodes[self.home])
        self.local = self.members.index(rank)
        self.owners = min(sizes) if node == "direct" else None
        self.node, self.rail, self.node_count = node, rail, len(nodes)
        lo, hi = self.inside(Kind.REDUCE_SCATTER).schedule.owned
        assert hi - lo <= 1, "a rank owns one shard of its node's buffer"
        self.group = tuple(ranks[self.local] for ranks in nodes) if lo < hi else ()

    def inside(self, kind: Kind) -> Level:
        size = len(self.members)
        schedule = build(self.node, kind, self.local, size, self.owners)
        return Level("node", self.members, schedule)

    def across(self, kind: Kind) -> Level:
        return Level("rail", self.group, build(self.rail, kind, self.home, self.node_count))

    def parts(self, kind: Kind) -> int:
        """Chunks of a shard; the same on every rail."""
        return build(self.rail, kind, 0, self.node_count).chunks

    def levels(self, kind: Kind) -> tuple[Level, ...]:
        rail = [self.across(kind)] if self.group else []
        before = [] if kind is Kind.ALLGATHER else [self.inside(Kind.REDUCE_SCATTER)]
        after = [] if kind is Kind.REDUCE_SCATTER else [self.inside(Kind.ALLGATHER)]
        return tuple(level for level in (*before, *rail, *after) if len(level.group) > 1)
