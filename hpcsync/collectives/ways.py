"""The transports of a rank, by the kind of memory that they join.

host     node by shared_memory or mpi_host, rail and world by mpi_host
device   node and rail as ``routes`` chose them, world as the rail
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..config import CommConfig
from ..conflicts import NATIVE
from ..device import Device
from ..errors import DeviceError, UserError
from ..runtime import Runtime
from ..topology import Topology
from ..transports.base import Buffer, Region, Transport, device_buffer
from ..transports.messages import Completions
from .routes import Facts, agreed, choose

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from ..transports.cuda_ipc import CudaIpc

_DEVICE: Mapping[str, tuple[str, str]] = {
    "cuda_ipc": ("cuda_ipc", "CudaIpc"),
    "mpi_device": ("mpi_device", "MpiDevice"),
    "mpi_staged": ("mpi_staged", "MpiStaged"),
    "nccl": ("nccl", "Nccl"),
}


@dataclass(frozen=True)
class Ways:
    """Those for one kind of memory.

    Attributes:
        node: between the ranks of the node, where they do not share the buffer.
        shared: for buffers that they share; None if there are none.
        device: whose streams do the work; None on the host.
    """

    topology: Topology
    rank: int
    world: Transport
    node: Transport
    rail: Transport
    shared: Transport | None
    device: Device | None = None

    def inside(self, region: Region) -> Transport:
        """The way between the ranks of the node."""
        return self.shared if self.shared and region.buffer.shared else self.node

    def leaves(self, transport: Transport, peer: int) -> bool:
        """Whether what is sent to the group's rank ``peer`` leaves this node."""
        return transport.ranks[peer] not in self.topology.node(self.rank)

    def placed(self, region: Region) -> Region:
        """The region with a stream that works on it, if it is a device's."""
        return replace(region, stream=self.device.stream()) if self.device else region


class DeviceWays:
    """Transports of device memory, and the memory; making one is collective.

    Args:
        group: makes a communicator of this rank's group, see ``Runtime.group``.
        facts: what this rank can use.

    Attributes:
        ways: the transports.
        routes: why it is these.

    Raises:
        AgreedError: what the deck asks for cannot work.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: CommConfig,
        device: Device,
        facts: Facts,
        group: Callable[[Sequence[int]], Intracomm],
        completions: Completions,
    ) -> None:
        self._runtime, self._device, self._group = runtime, device, group
        self._completions = completions
        runtime.agreed(lambda: _check_algorithms(config))
        facts = agreed(runtime.allgather_object(facts))
        asked = config.node_transport, config.rail_transport
        self.routes = runtime.agreed(lambda: choose(*asked, facts))
        topology, rank = runtime.topology, runtime.rank
        one_node = topology.node_count == 1
        shared: Any = None
        if self.routes.node.transport == "cuda_ipc":
            shared = self._make("cuda_ipc", topology.node(rank))
            if config.node_transport == "auto" and (problem := self._unreachable(shared)):
                shared, facts = None, replace(facts, cuda_ipc=problem)
                self.routes = choose("auto", config.rail_transport, facts)
        node, rail = self.routes.node.transport, self.routes.rail.transport
        self.ways = Ways(
            topology,
            rank,
            self._make(rail, range(runtime.size)),
            self._make(rail if shared else node, topology.node(rank)),
            self._make(rail, topology.rail(rank)),
            shared,
            device,
        )
        self._shares = shared if one_node or topology.node_count < runtime.size else None

    def arena(self, nbytes: int, slots: int, by_levels: bool) -> Buffer:
        """Zeroed device memory, shared by the ranks of a node where they read each other's;
        collective.

        Args:
            slots: programs that it has room for at once.
            by_levels: whether ranks of a node exchange among themselves.

        Raises:
            AgreedError: some rank has no room; a DeviceError, too.
        """
        buffer: Buffer | None = None
        problem: DeviceError | None = None
        try:
            if self._shares is not None and by_levels:
                buffer = self._shares.allocate(nbytes, slots)
            else:
                buffer = device_buffer(self._device, nbytes)
        except DeviceError as error:
            problem = error
        self._runtime.agree(problem)
        assert buffer is not None
        return buffer

    def _unreachable(self, shared: CudaIpc) -> str:
        """Why some rank cannot use the memory of another of its node; collective.

        A trial before the job knows the pairs of GPUs that one process sees only.
        """
        problem = ""
        try:
            shared.allocate(1, 1)
        except DeviceError as error:
            problem = str(error).removeprefix("cuda_ipc: ")
        shared.memories.release()
        every = self._runtime.allgather_object(problem)
        return next(filter(None, every), "").removesuffix("; use comm.transport.node=mpi_staged")

    def _make(self, name: str, ranks: Sequence[int]) -> Transport:
        """The transport of that name between these ranks; collective over all.

        Raises:
            AgreedError: it cannot work on some node; a DeviceError, too.
        """
        module, kind = _DEVICE[name]
        made: Any = getattr(importlib.import_module(f"hpcsync.transports.{module}"), kind)
        comm, device = self._group(ranks), self._device
        transport: Transport | None = None
        problem: DeviceError | None = None
        try:
            if name in ("mpi_device", "mpi_staged"):
                transport = made(comm, tuple(ranks), device, completions=self._completions)
            else:
                transport = made(comm, tuple(ranks), device, self._runtime.wait)
        except DeviceError as error:
            problem = error
        self._runtime.agree(problem)
        assert transport is not None
        return transport


def _check_algorithms(config: CommConfig) -> None:
    for key in ("algorithm", "rail_algorithm"):
        if getattr(config, key) == "native":
            raise UserError(f"comm.{key}: {NATIVE.format(key=f'comm.{key}')}")
