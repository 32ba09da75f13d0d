"""From a region of a buffer to the stages that add it: which schedule runs on which transport."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .. import schedules
from ..config import CommConfig
from ..schedules.base import Kind, Schedule
from ..schedules.hierarchical import compose
from ..transports.base import Region, Transport, sent_bytes
from . import choice
from .collective import Stage
from .ways import Ways

_NODE, _GATHER, RAIL = 0, 1, 2  # a segment's tags, from its first on
TAGS = 8  # that a segment takes; a coded rail may take several


Across = Callable[[Region, int, int], Stage]


@dataclass(frozen=True)
class Binding:
    """How one allreduce is bound.

    Attributes:
        algorithm: over all ranks, as ``choice.resolve`` gave it.
        divisor: of the sums.
        next_tag: gives the first of ``TAGS`` tags that nobody else has.
    """

    ways: Ways
    config: CommConfig
    algorithm: str
    divisor: int
    next_tag: Callable[[], int]

    def segments(self, whole: Region) -> Iterator[Region]:
        """The pieces of what goes uncoded."""
        pieces = choice.segments(self.config, self.ways.topology, whole.nbytes)
        if self.algorithm == "native":
            pieces = 1
        align = max(1, 64 // whole.dtype.itemsize)
        bounds = schedules.chunk_bounds(whole.count, pieces, align)
        for start, stop in itertools.pairwise(bounds):
            yield self.ways.placed(whole.part(start, stop))

    def stages(self, region: Region) -> list[Stage]:
        """The levels of one uncoded segment."""
        tag = self.next_tag()
        ways = self.ways
        if ways.topology.size == 1:
            return []
        if self.algorithm == "hierarchical":
            return self._hierarchy(region, tag)
        one_node = ways.topology.node_count == 1
        # Only the world's transport has MPI's own.
        near = one_node and self.algorithm != "native"
        flat = ways.inside(region) if near else ways.world
        every = schedules.everyone(self.algorithm, Kind.ALLREDUCE, flat.size)
        level = "node" if one_node else "world"
        return [self._stage(level, flat, every, region, tag, self.divisor)]

    def across(self, region: Region, cuts: Sequence[int], stage: Across) -> list[Stage]:
        """The levels of a segment whose rail is somebody else's.

        Args:
            cuts: where the region is cut into one shard a rail.
            stage: makes the rail's stage of (shard, its start in the region, tag).
        """
        cut = dataclasses.replace(region, cuts=tuple(cuts))
        return self._hierarchy(cut, self.next_tag(), stage)

    def early(self, region: Region) -> int:
        """The part of the divisor that the node's sum is divided by.

        Low precision is rounded between levels, and the node's sum could overflow.
        """
        rails = self.ways.topology.rails
        narrow = region.dtype.storage != region.dtype.accumulate
        return rails if narrow and self.divisor % rails == 0 else 1

    def _hierarchy(self, region: Region, tag: int, stage: Across | None = None) -> list[Stage]:
        """Reduce-scatter in the node, allreduce along the rail, allgather in the node."""
        ways = self.ways
        align = max(1, 64 // region.dtype.itemsize)
        cuts = region.cuts or schedules.chunk_bounds(region.count, ways.topology.rails, align)
        local = min(ways.topology.local_rank(ways.rank), ways.topology.rails - 1)
        shard = region.part(cuts[local], cuts[local + 1])
        early = self.early(region)
        rail = choice.rail_algorithm(
            self.config, ways.topology.node_count, shard.nbytes, region.dtype
        )
        inside = ways.inside(region)
        stages: list[Stage] = []
        for level in compose(ways.topology.nodes, ways.rank, rail=rail):
            own = level.schedule
            owners = own.chunks if own.name == "direct" else None
            every = schedules.everyone(own.name, own.kind, own.size, owners)
            if level.name != "rail":
                gather = own.kind is Kind.ALLGATHER
                at, divisor = (tag + _GATHER, 1) if gather else (tag + _NODE, early)
                stages.append(self._stage("node", inside, every, region, at, divisor, gather))
            elif stage:
                stages.append(stage(shard, cuts[local], tag + RAIL))
            else:
                divisor = self.divisor // early
                stages.append(self._stage("rail", ways.rail, every, shard, tag + RAIL, divisor))
        return stages

    def _stage(
        self,
        level: str,
        transport: Transport,
        every: Sequence[Schedule],
        region: Region,
        tag: int,
        divisor: int,
        released: bool = False,
    ) -> Stage:
        program = transport.bind(every, region, tag, divisor, released)
        sent = self._internode(transport, every[transport.rank], region)
        return Stage(level, program, sent, sent)

    def _internode(self, transport: Transport, schedule: Schedule, region: Region) -> int:
        """Bytes of the schedule that this rank sends to other nodes."""
        far = [peer for peer in range(transport.size) if self.ways.leaves(transport, peer)]
        if far and schedule.name == "native":  # MPI does not tell; what a ring would send
            return 2 * region.nbytes * (transport.size - 1) // transport.size
        return sent_bytes(schedule, region, far)
