"""All collectives of one rank: its transports by level, its progress thread, its buffers.

node   ranks of one node        shared_memory (or mpi_host)
rail   one rank of each node    mpi_host
world  all ranks                mpi_host, for the flat algorithms

These join host memory; those of gradients on a device stand beside them, see ``ways``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..config import CommConfig
from ..device import Device, DType, dtype_of, host, kernels
from ..errors import UserError
from ..launch import AgreedError, Runtime
from ..trace.recorder import Recorder
from ..transports.base import Buffer, Region, private_buffer
from ..transports.messages import Completions
from ..transports.mpi_host import MpiHost
from ..transports.shared_memory import SharedMemory, SharedMemoryError
from . import choice
from .binding import TAGS, Binding
from .coded import coded_segments
from .coding import Coding
from .collective import Collective
from .progress import Progress
from .routes import Facts, Routes, check_host
from .ways import DeviceWays, Ways

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
        device: that gradients are on; if not given, only host memory is exchanged, whatever the
            deck says of devices.
        facts: what this rank's device can use.

    Attributes:
        tried: when that was found out, in words.

    Raises:
        AgreedError: the transports or the algorithm of the deck cannot work on that device.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: CommConfig,
        recorder: Recorder | None = None,
        device: Device | None = None,
        facts: Facts | None = None,
    ) -> None:
        self.runtime = runtime
        self.recorder = recorder or Recorder()
        self.config = config
        self.topology = runtime.topology
        self.host = host()
        self.device: Device = device or self.host
        if runtime.rank == 0 and (missing := kernels.missing()):
            print(f"hpcsync: warning: {missing}", file=sys.stderr, flush=True)
        self.progress = Progress(
            int(config.credit_mb * _MIB),
            config.timeout_s,
            runtime.crowding,
            patient=not self.device.queued,
        )
        self.tried = ""
        self._tags = 0
        self._comms: list[Intracomm] = []
        self._completions = Completions()
        self.world = self._mpi(range(runtime.size))
        self.node = self._mpi(self.topology.node(runtime.rank))
        self.rail = self._mpi(self.topology.rail(runtime.rank))
        self.shared: SharedMemory | None = None
        if device is not None and not device.queued:
            asked = config.node_transport, config.rail_transport
            runtime.agreed(lambda: check_host(*asked))
        if config.node_transport != "mpi_host":
            self.shared = SharedMemory(self.node.comm, self.node.ranks, self.host, runtime.wait)
        self._on_device: DeviceWays | None = None
        if self.device.queued:
            self._on_device = DeviceWays(
                runtime, config, self.device, facts or Facts(), self._group, self._completions
            )
        self._bound: weakref.WeakSet[Collective] = weakref.WeakSet()
        self._by_levels = choice.by_levels(config, self.topology, dtype_of("float32"))
        self._closed = False
        runtime.on_close(self.close)

    def halt(self) -> None:
        """Stop the progress thread, at the end of a script that closes nothing; other ranks are to
        be waited for after it. What this rank's device was given is done then: what it reads may be
        in the memory of a rank that ends.

        Raises:
            CollectiveTimeout: the device has not come so far within ``comm.timeout_s``.
        """
        if self.device.queued and self.progress.sound:
            self.progress.settle(self.device.current().record())
        self.progress.close()

    def close(self) -> None:
        """Stop the progress thread; free what is bound, and the communicators.

        Memory that other ranks have opened is freed when all are done with it; not at all when
        this rank, or another, has failed.
        """
        if self._closed:
            return
        self._closed = True
        orderly = self.progress.sound and sys.exc_info()[0] is None
        self.progress.close()
        for collective in list(self._bound):
            if orderly or not self.device.queued:  # its device may wait for a rank that is gone
                collective.close()
        shared = self._on_device.ways.shared if self._on_device else None
        if shared is not None and not shared.close(orderly=orderly):
            return
        while self._comms:
            self._comms.pop().Free()

    def reached(self) -> dict[str, int]:
        """How many runs of each collective were started on this rank, by label."""
        found: dict[str, int] = {}
        for collective in list(self._bound):
            found[collective.label] = max(found.get(collective.label, 0), collective.runs)
        return found

    def describe_transports(self) -> dict[str, str]:
        """The transport of each level that gradients go through, by level; on a device with why
        it is not the one that would be better."""
        levels: dict[str, str] = {}
        node, rail = "shared_memory" if self.shared else "mpi_host", "mpi_host"
        if routes := self.routes:
            node, rail = routes.node.described, routes.rail.described
        if self.runtime.size > 1 and not self._by_levels:
            return {"world": rail}
        if max(len(ranks) for ranks in self.topology.nodes) > 1:
            levels["node"] = node
        if self.topology.node_count > 1:
            levels["rail"] = rail
        return levels

    @property
    def routes(self) -> Routes | None:
        """Why gradients in a device's memory go as they do; None on the host."""
        return self._on_device.routes if self._on_device else None

    def arena(self, nbytes: int, bindings: int = 1, pieces: int = 1) -> Buffer:
        """As ``buffer``, in the memory of the device that gradients are on.

        Raises:
            AgreedError: some rank's device has no room; a DeviceError, too.
        """
        if self._on_device is None:
            return self.buffer(nbytes, bindings, pieces)
        slots = self._slots(nbytes, bindings, pieces)
        return self._on_device.arena(nbytes, slots, self._by_levels)

    def buffer(self, nbytes: int, bindings: int = 1, pieces: int = 1) -> Buffer:
        """Zeroed host memory of ``nbytes`` bytes, shared by the ranks of each node where it can be.

        Args:
            bindings: how many allreduces of the whole will be bound to it at once.
            pieces: in how many parts each of them comes (a bucket each, say).

        Raises:
            AgreedError: ``comm.transport.node = "shared_memory"`` and there is no room.
        """
        # One rank a node has nobody to share memory with; flat algorithms go by messages only.
        alone = self.topology.node_count == self.runtime.size
        if self.shared is None or alone or not self._by_levels:
            return private_buffer(nbytes)
        slots = self._slots(nbytes, bindings, pieces)
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
            raise AgreedError(
                f"comm.transport.node: shared_memory has no room ({problems[0]}); enlarge "
                "/dev/shm (containers: --shm-size) or set comm.transport.node=auto"
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

    def _slots(self, nbytes: int, bindings: int, pieces: int) -> int:
        """Programs that are bound to a buffer at once."""
        segments = choice.segments(self.config, self.topology, nbytes) + pieces - 1
        return _STAGES * segments * bindings + _SPARE_SLOTS

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
        binding = Binding(
            self._ways(buffer), config, name, self.runtime.size if average else 1, self._next_tag
        )
        whole = Region(buffer, offset, count, dtype)
        coded = 0
        if coding and coding.count and choice.codes(coding.where, self.topology):
            coded = coding.count + choice.tail(coding.codec, count - coding.count)
            collective.coded = coded
            for segment in coded_segments(binding, whole.part(0, coded), coding):
                part = segment.region
                collective.add_segment(part.nbytes, segment.stages, part.stream)
                collective.held += segment.held
        if coded < count or not coded:
            for region in binding.segments(whole.part(coded, count)):
                collective.add_segment(region.nbytes, binding.stages(region), region.stream)
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

    def _ways(self, buffer: Buffer) -> Ways:
        if buffer.queued:
            assert self._on_device is not None, "a device's buffer, and collectives of the host"
            return self._on_device.ways
        return Ways(self.topology, self.runtime.rank, self.world, self.node, self.rail, self.shared)

    def _mpi(self, ranks: Sequence[int]) -> MpiHost:
        comm = self._group(ranks)
        return MpiHost(comm, tuple(ranks), self.host, completions=self._completions)

    def _group(self, ranks: Sequence[int]) -> Intracomm:
        """A communicator of this rank's group, freed by ``close``; collective."""
        comm = self.runtime.group(tuple(ranks))
        self._comms.append(comm)
        return comm
