"""All collectives of one rank: its transports by level, its progress thread, its buffers.

node   ranks of one node        shared_memory (or mpi_host)
rail   one rank of each node    mpi_host
world  all ranks                mpi_host, for the flat algorithms
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import schedules
from ..config import CommConfig
from ..device import DType, dtype_of, get
from ..errors import UserError
from ..launch import Runtime
from ..schedules.base import Kind, Schedule
from ..schedules.hierarchical import compose
from ..transports.base import Buffer, Region, Transport, private_buffer, sent_bytes
from ..transports.mpi_host import Completions, MpiHost
from ..transports.shared_memory import SharedMemory, SharedMemoryError
from . import choice
from .collective import Collective, Stage
from .progress import Progress

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

_MIB = 1 << 20
_SPARE_SLOTS = 256
_STAGES = 3  # programs a segment at most


class Collectives:
    """Makes buffers and binds allreduces to them.

    Creating one, making a buffer and binding an allreduce are collective: every rank makes the
    same calls in the same order.

    Args:
        runtime: the job.
        config: the ``comm`` section of the deck.
    """

    def __init__(self, runtime: Runtime, config: CommConfig) -> None:
        self.runtime = runtime
        self.config = config
        self.topology = runtime.topology
        self.device = get("cpu")
        self.progress = Progress(int(config.credit_mb * _MIB), config.timeout_s, runtime.crowding)
        self._tags = 0
        self._comms: list[Intracomm] = []
        self._completions = Completions()
        self.world = self._mpi(range(runtime.size))
        self.node = self._mpi(self.topology.node(runtime.rank))
        self.rail = self._mpi(self.topology.rail(runtime.rank))
        self.shared: SharedMemory | None = None
        if config.node_transport != "mpi_host":
            self.shared = SharedMemory(self.node.comm, self.node.ranks, self.device, runtime.wait)
        self._bound: weakref.WeakSet[Collective] = weakref.WeakSet()
        self._by_levels = choice.by_levels(config, self.topology, dtype_of("float32"))
        runtime.on_close(self.close)

    def close(self) -> None:
        """Stop the progress thread; free what is bound, and the communicators."""
        self.progress.close()
        for collective in list(self._bound):
            collective.close()
        while self._comms:
            self._comms.pop().Free()

    def describe_transports(self) -> dict[str, str]:
        """The transport of each level that gradients go through, by level."""
        levels: dict[str, str] = {}
        if self.runtime.size > 1 and not self._by_levels:
            return {"world": "mpi_host"}
        if max(len(ranks) for ranks in self.topology.nodes) > 1:
            levels["node"] = "shared_memory" if self.shared else "mpi_host"
        if self.topology.node_count > 1:
            levels["rail"] = "mpi_host"
        return levels

    def buffer(self, nbytes: int, bindings: int = 1, pieces: int = 1) -> Buffer:
        """Zeroed memory of ``nbytes`` bytes, shared by the ranks of each node where it can be.

        Args:
            bindings: how many allreduces of the whole will be bound to it at once.
            pieces: in how many parts each of them comes (a bucket each, say).

        Raises:
            UserError: ``comm.node_transport = "shared_memory"`` and there is no room.
        """
        # One rank a node has nobody to share memory with; flat algorithms go by messages only.
        alone = self.topology.node_count == self.runtime.size
        if self.shared is None or alone or not self._by_levels:
            return private_buffer(nbytes)
        segments = choice.segments(self.config, self.topology, nbytes) + pieces - 1
        slots = _STAGES * segments * bindings + _SPARE_SLOTS
        buffer: Buffer | None = None
        problem = ""
        try:
            buffer = self.shared.allocate(nbytes, slots)
        except SharedMemoryError as error:
            problem = str(error)
        problems = [each for each in self.runtime.allgather_object(problem) if each]
        if not problems and buffer is not None:
            return buffer
        if self.config.node_transport == "shared_memory":
            raise UserError(
                f"comm.node_transport: shared_memory has no room ({problems[0]}); enlarge "
                "/dev/shm (containers: --shm-size) or set comm.node_transport=auto"
            )
        if self.runtime.rank == 0:
            print(
                f"hpcsync: warning: {problems[0]}; ranks of a node use mpi_host instead, which "
                "is slower; enlarge /dev/shm (containers: --shm-size)",
                file=sys.stderr,
                flush=True,
            )
        self.shared = None
        return private_buffer(nbytes)

    def allreduce(
        self,
        buffer: Buffer,
        dtype: DType,
        *,
        count: int | None = None,
        offset: int = 0,
        average: bool = False,
        algorithm: str = "",
        label: str = "allreduce",
    ) -> Collective:
        """Bind an allreduce to ``count`` elements from byte ``offset`` of ``buffer`` on.

        Args:
            average: divide the sum by the number of ranks.
            algorithm: as ``comm.algorithm``, which is taken when empty.
            label: name in reports.
        """
        if count is None:
            count = (buffer.nbytes - offset) // dtype.itemsize
        name = choice.resolve(self.config, self.topology, dtype, algorithm)
        collective = Collective(self.progress, label, count * dtype.itemsize, name)
        divisor = self.runtime.size if average else 1
        whole = Region(buffer, offset, count, dtype)
        pieces = choice.segments(self.config, self.topology, whole.nbytes)
        if name == "native":
            pieces = 1
        bounds = schedules.chunk_bounds(count, pieces, max(1, 64 // dtype.itemsize))
        for start, stop in itertools.pairwise(bounds):
            region = whole.part(start, stop)
            # Ranks of uneven nodes have different stages, but a stage has one tag on all of them.
            self._tags += _STAGES
            collective.add_segment(region.nbytes, self._stages(name, region, divisor))
        self._bound.add(collective)
        return collective

    def _stages(self, name: str, region: Region, divisor: int) -> list[Stage]:
        if self.runtime.size == 1:
            return []
        if name == "hierarchical":
            return self._hierarchy(region, divisor)
        one_node = self.topology.node_count == 1
        flat: Transport = self.world
        if one_node and region.buffer.shared and name != "native" and self.shared:
            flat = self.shared
        every = schedules.everyone(name, Kind.ALLREDUCE, flat.size)
        return [self._stage("node" if one_node else "world", flat, every, region, divisor)]

    def _hierarchy(self, region: Region, divisor: int) -> list[Stage]:
        """Reduce-scatter in the node, allreduce along the rail, allgather in the node."""
        topology, rank = self.topology, self.runtime.rank
        node: Transport = self.shared if self.shared and region.buffer.shared else self.node
        align = max(1, 64 // region.dtype.itemsize)
        shards = schedules.chunk_bounds(region.count, topology.rails, align)
        local = min(topology.local_rank(rank), topology.rails - 1)
        shard = region.part(shards[local], shards[local + 1])
        rail = choice.rail_algorithm(self.config, topology.node_count, shard.nbytes, region.dtype)
        # Low precision is rounded between levels: part of the division comes before that, since
        # the node's sum could overflow.
        narrow = region.dtype.storage != region.dtype.accumulate
        early = topology.rails if narrow and divisor % topology.rails == 0 else 1
        stages: list[Stage] = []
        for level in compose(topology.nodes, rank, rail=rail):
            own = level.schedule
            owners = own.chunks if own.name == "direct" else None
            every = schedules.everyone(own.name, own.kind, own.size, owners)
            if level.name == "rail":
                stages.append(self._stage("rail", self.rail, every, shard, divisor // early))
            else:
                after = own.kind is Kind.ALLGATHER
                inner = 1 if after else early
                stages.append(self._stage("node", node, every, region, inner, released=after))
        return stages

    def _stage(
        self,
        level: str,
        transport: Transport,
        every: Sequence[Schedule],
        region: Region,
        divisor: int,
        released: bool = False,
    ) -> Stage:
        tag = self._tags + (2 if released else 1 if level == "rail" else 0)
        program = transport.bind(every, region, tag, divisor, released)
        return Stage(level, program, self._internode(transport, every[transport.rank], region))

    def _internode(self, transport: Transport, schedule: Schedule, region: Region) -> int:
        """Bytes of the schedule that this rank sends to other nodes."""
        here = set(self.topology.node(self.runtime.rank))
        far = [peer for peer, rank in enumerate(transport.ranks) if rank not in here]
        if far and schedule.name == "native":  # MPI does not tell; what a ring would send
            return 2 * region.nbytes * (transport.size - 1) // transport.size
        return sent_bytes(schedule, region, far)

    def _mpi(self, ranks: Sequence[int]) -> MpiHost:
        comm = self.runtime.group(tuple(ranks))
        self._comms.append(comm)
        return MpiHost(comm, tuple(ranks), self.device, completions=self._completions)
