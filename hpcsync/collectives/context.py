"""All collectives of one rank: its transports by level, its progress thread, its buffers.

node   ranks of one node        shared_memory (or mpi_host)
rail   one rank of each node    mpi_host
world  all ranks                mpi_host, for the flat algorithms
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..config import CommConfig
from ..device import DType, dtype_of, get, kernels
from ..errors import UserError
from ..launch import Runtime
from ..trace.recorder import Recorder
from ..transports.base import Buffer, Region, private_buffer
from ..transports.mpi_host import Completions, MpiHost
from ..transports.shared_memory import SharedMemory, SharedMemoryError
from . import choice
from .binding import TAGS, Binding, Ways
from .coded import coded_segments
from .coding import Coding
from .collective import Collective
from .progress import Progress

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

_MIB = 1 << 20
_SPARE_SLOTS = 256
_STAGES = 3  # programs of a segment in a shared buffer, at most


class Collectives:
    """Makes buffers and binds allreduces to them.

    Creating one, making a buffer and binding an allreduce are collective: every rank makes the
    same calls in the same order.

    Args:
        runtime: the job.
        config: the ``comm`` section of the deck.
        recorder: of this rank's times; made if not given.
    """

    def __init__(
        self, runtime: Runtime, config: CommConfig, recorder: Recorder | None = None
    ) -> None:
        self.runtime = runtime
        self.recorder = recorder or Recorder()
        self.config = config
        self.topology = runtime.topology
        self.device = get("cpu")
        if runtime.rank == 0 and (missing := kernels.missing()):
            print(f"hpcsync: warning: {missing}", file=sys.stderr, flush=True)
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

    def reached(self) -> dict[str, int]:
        """How many runs of each collective were started on this rank, by label."""
        found: dict[str, int] = {}
        for collective in list(self._bound):
            found[collective.label] = max(found.get(collective.label, 0), collective.runs)
        return found

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
        coding: Coding | None = None,
        config: CommConfig | None = None,
        bucket: int = -1,
    ) -> Collective:
        """Bind an allreduce to ``count`` elements from byte ``offset`` of ``buffer`` on.

        Args:
            average: divide the sum by the number of ranks.
            algorithm: as ``comm.algorithm``, which is taken when empty.
            label: name in reports.
            coding: how the first elements are coded; floating dtypes only.
            config: the ``comm`` section for this one, if not that of all.
            bucket: index of the bucket that it carries, for the trace.
        """
        if coding is not None and not dtype.floating:
            raise UserError(
                f"{label}: codec {coding.codec.name} codes floating-point gradients only, not "
                f"{dtype.name}; use compress.codec=none for them"
            )
        config = config or self.config
        if count is None:
            count = (buffer.nbytes - offset) // dtype.itemsize
        name = choice.resolve(config, self.topology, dtype, algorithm)
        collective = Collective(
            self.progress, label, count * dtype.itemsize, name, self.recorder, bucket
        )
        ways = Ways(self.topology, self.runtime.rank, self.world, self.node, self.rail, self.shared)
        binding = Binding(ways, config, name, self.runtime.size if average else 1, self._next_tag)
        whole = Region(buffer, offset, count, dtype)
        coded = 0
        if coding and coding.count and choice.codes(coding.where, self.topology):
            coded = coding.count + choice.tail(coding.codec, count - coding.count)
            collective.coded = coded
            for segment in coded_segments(binding, whole.part(0, coded), coding):
                collective.add_segment(segment.nbytes, segment.stages)
                collective.held += segment.held
        if coded < count or not coded:
            for region in binding.segments(whole.part(coded, count)):
                collective.add_segment(region.nbytes, binding.stages(region))
        self._bound.add(collective)
        return collective

    def node_sum(self, values: NDArray[np.float32]) -> None:
        """Add an array over the ranks of the node, in place; collective over the node.

        For rare things: it must not run beside collectives of the progress thread.
        """
        from mpi4py import MPI

        if self.node.size > 1:
            self.runtime.wait(self.node.comm.Iallreduce(MPI.IN_PLACE, values, MPI.SUM))

    def _next_tag(self) -> int:
        # Ranks of uneven nodes have different stages, but a stage has one tag on all of them.
        self._tags += TAGS
        return self._tags

    def _mpi(self, ranks: Sequence[int]) -> MpiHost:
        comm = self.runtime.group(tuple(ranks))
        self._comms.append(comm)
        return MpiHost(comm, tuple(ranks), self.device, completions=self._completions)
