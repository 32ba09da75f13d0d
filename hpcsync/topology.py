"""Which ranks share a node, and how nodes are joined by rails: pure, from host names.

    node 0: ranks 0 1        rail 0: ranks 0 2   (local index 0 of each node)
    node 1: ranks 2 3        rail 1: ranks 1 3   (local index 1 of each node)

Gradients are summed inside a node first, then along the rails, so that each byte crosses the
slow link once each way. Where nodes hold different numbers of ranks, there are as many rails
as the smallest node has ranks; further ranks take part in their node only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .errors import LaunchError


@dataclass(frozen=True)
class Topology:
    """The grouping of all ranks of a job.

    Attributes:
        nodes: the ranks of each node, ascending; nodes stand in the order of their lowest rank.
        names: one name a node.
    """

    nodes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]

    @classmethod
    def group(cls, hosts: Sequence[str], ranks_per_node: int = 0) -> Topology:
        """Group ranks by host name, or into pretended nodes of ``ranks_per_node`` ranks.

        Args:
            hosts: the host name of each rank, by rank.
            ranks_per_node: 0 to go by host name; else each host's ranks are cut, in rank order,
                into nodes of this many (the last of a host may be smaller).

        Raises:
            LaunchError: no ranks, or a negative ``ranks_per_node``.
        """
        if not hosts:
            raise LaunchError("topology: no ranks to group; start at least one")
        if ranks_per_node < 0:
            raise LaunchError(
                f"topology.ranks_per_node: {ranks_per_node} is negative; use 0 to group by host"
            )
        by_host: dict[str, list[int]] = {}
        for rank, host in enumerate(hosts):
            by_host.setdefault(host, []).append(rank)
        pieces: list[tuple[tuple[int, ...], str]] = []
        for host, ranks in by_host.items():
            width = ranks_per_node or len(ranks)
            for index, start in enumerate(range(0, len(ranks), width)):
                name = host if width >= len(ranks) else f"{host}/{index}"
                pieces.append((tuple(ranks[start : start + width]), name))
        pieces.sort()
        return cls(tuple(ranks for ranks, _ in pieces), tuple(name for _, name in pieces))

    @cached_property
    def size(self) -> int:
        """Ranks in the job."""
        return sum(len(ranks) for ranks in self.nodes)

    @cached_property
    def _place(self) -> dict[int, tuple[int, int]]:
        return {
            rank: (node, local)
            for node, ranks in enumerate(self.nodes)
            for local, rank in enumerate(ranks)
        }

    @property
    def node_count(self) -> int:
        return len(self.nodes)

    @cached_property
    def rails(self) -> int:
        """Rails across the nodes: the number of ranks of the smallest node."""
        return min(len(ranks) for ranks in self.nodes)

    @cached_property
    def uniform(self) -> bool:
        """True when every node has the same number of ranks."""
        return len({len(ranks) for ranks in self.nodes}) == 1

    def node_of(self, rank: int) -> int:
        return self._place[rank][0]

    def local_rank(self, rank: int) -> int:
        return self._place[rank][1]

    def local_size(self, rank: int) -> int:
        return len(self.nodes[self.node_of(rank)])

    def node(self, rank: int) -> tuple[int, ...]:
        """The ranks of the node of ``rank``."""
        return self.nodes[self.node_of(rank)]

    def rail(self, rank: int) -> tuple[int, ...]:
        """The ranks with the local index of ``rank``, one a node; empty if it is on no rail."""
        local = self.local_rank(rank)
        return tuple(ranks[local] for ranks in self.nodes) if local < self.rails else ()

    def describe(self) -> str:
        """One line: ``4 ranks on 2 nodes (2 x 2)``."""
        sizes = Counter(len(ranks) for ranks in self.nodes)
        shape = " + ".join(f"{count} x {size}" for size, count in sorted(sizes.items()))
        nodes = "node" if self.node_count == 1 else "nodes"
        ranks = "rank" if self.size == 1 else "ranks"
        return f"{self.size} {ranks} on {self.node_count} {nodes} ({shape})"
