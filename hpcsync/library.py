"""The library face: what a user's own script calls under mpirun.

    hpcsync.init()
    model = hpcsync.DataParallel(model)
    for inputs, targets in my_share(hpcsync.rank(), hpcsync.size()):
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()   # gradients are averages over ranks now
        optimizer.step()

Every function but the ones that ask for a number is collective: all ranks call it, in the same
order.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import binding, launch
from . import config as configuration
from .collectives import Collectives, routes
from .collectives.eager import Eager
from .device import DEVICES, dtype_of
from .errors import ConfigError, LaunchError, UserError
from .exits import Exits
from .parallel import data_parallel
from .parallel.placement import collectives_on, device_of
from .wording import toml


class Op(enum.Enum):
    """What an allreduce does with the ranks' values."""

    AVERAGE = "average"
    SUM = "sum"
    MIN = "min"
    MAX = "max"


Average, Sum, Min, Max = Op.AVERAGE, Op.SUM, Op.MIN, Op.MAX


class _Reach(NamedTuple):
    """How tensors of one device are exchanged."""

    collectives: Collectives
    eager: Eager


@dataclasses.dataclass(frozen=True)
class _Session:
    """What ``init`` made.

    Attributes:
        reaches: by device; the host's is there from the beginning.
        stops: to be called before this process ends.
        kinds: of devices that all ranks have used together.
    """

    runtime: launch.Runtime
    config: configuration.Config
    exits: Exits
    reaches: dict[str, _Reach]
    stops: list[Callable[[], None]]
    kinds: set[str] = dataclasses.field(default_factory=set)

    def reach(self, tensors: Iterable[Tensor]) -> _Reach:
        """For tensors of one device; collective when it is the first time for that device.

        Raises:
            DeviceError: the device cannot be used.
            LaunchError: other ranks' are of another kind of device.
        """
        tensors = list(tensors)
        kind = tensors[0].device.type if tensors else "cpu"
        if kind not in self.kinds:
            self._agree_on(kind, tensors)
        device = device_of(tensors)
        if device.identity not in self.reaches:
            made = collectives_on(self.runtime, self.config.comm, device)
            self.stops.append(made.halt)
            self.reaches[device.identity] = _Reach(made, Eager(made))
        return self.reaches[device.identity]

    def _agree_on(self, kind: str, tensors: Sequence[Tensor]) -> None:
        """Before anything else is collective: ranks that differ would mix up collectives."""
        problem: UserError | None = None
        try:
            binding.check_kinds(self.runtime.allgather_object(kind))
            device_of(tensors)
        except UserError as error:
            problem = error
        self.runtime.agree(problem)
        self.kinds.add(kind)


_session: _Session | None = None  # one process is one rank of one job


def init(deck: str | Path | None = None, overrides: Sequence[str] = ()) -> None:
    """Start: find the other ranks. A second call does nothing.

    From here on an exception that nobody catches, on any rank and thread, ends the whole job; so
    does an exit with a status that is not 0. A rank that comes to its end waits for the others.

    Args:
        deck: a TOML deck; its sections ``topology``, ``comm`` and ``compress`` count here.
        overrides: ``key=value`` as on the command line, e.g. ``["comm.bucket_mb=10"]``.

    Raises:
        ConfigError: the deck or an override is wrong.
        LaunchError: MPI is missing or the ranks did not find each other.
    """
    global _session
    if _session is not None:
        return
    config = configuration.load(Path(deck) if deck is not None else None, overrides)
    runtime = launch.start(config.topology, config.comm.timeout_s)
    collectives = Collectives(runtime, config.comm)
    stops: list[Callable[[], None]] = [collectives.halt]

    def stop() -> None:
        """Progress threads must have stopped before mpi4py finalizes MPI at exit."""
        for each in stops:
            each()

    exits = Exits(runtime.comm, stop)
    host = _Reach(collectives, Eager(collectives))
    _session = _Session(runtime, config, exits, {collectives.device.identity: host}, stops)


def is_initialized() -> bool:
    """Whether ``init`` has been called."""
    return _session is not None


def shutdown() -> None:
    """Stop communication; collective, and optional at the end of a script."""
    global _session
    if _session is not None:
        session, _session = _session, None
        session.exits.close()
        session.runtime.close()


def _current() -> _Session:
    if _session is None:
        raise LaunchError("hpcsync.init() has not been called; call it first, on every rank")
    return _session


def rank() -> int:
    """This process's number among all, from 0."""
    return _current().runtime.rank


def size() -> int:
    """Number of ranks."""
    return _current().runtime.size


def local_rank() -> int:
    """This process's number among those of its node, from 0."""
    return _current().runtime.local_rank


def local_size() -> int:
    """Number of ranks of this node."""
    return _current().runtime.local_size


def cross_rank() -> int:
    """Number of this node among all, from 0."""
    runtime = _current().runtime
    return runtime.topology.node_of(runtime.rank)


def cross_size() -> int:
    """Number of nodes."""
    return _current().runtime.topology.node_count


class DataParallel(data_parallel.DataParallel):
    """A module whose gradients are averaged over all ranks during the backward pass.

    Args:
        module: the same on every rank, on one device: move it there first. It takes rank 0's
            values.
        bucket_cap_mb: size of a bucket in MiB; the deck's if not given.
        codec: how gradients travel, as ``compress.codec``; the deck's if not given.
        compress: further keys of the deck's section, e.g. ``{"rank": 8, "warmup": 100}``.
        broadcast_buffers: set buffers to rank 0's before each forward pass in training.

    Raises:
        ConfigError: a value that the deck would not take either.
        DeviceError: the module's device cannot be used.
        LaunchError: two ranks have their module on the same GPU, or one on a GPU and one not.
        ModelError: the ranks' modules differ, or its parameters are not all on one device.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        bucket_cap_mb: float | None = None,
        codec: str | None = None,
        compress: Mapping[str, Any] | None = None,
        broadcast_buffers: bool = True,
    ) -> None:
        session = _current()
        comm, coded = session.config.comm, session.config.compress
        if codec is not None:
            checked = _check("codec", f"compress.codec={toml(codec)}")
            coded = dataclasses.replace(coded, codec=checked.compress.codec)
        for name, value in (compress or {}).items():
            checked = _check("compress", f"compress.{name}={toml(value)}")
            coded = dataclasses.replace(coded, **{name: getattr(checked.compress, name)})
        if bucket_cap_mb is not None:
            checked = _check("bucket_cap_mb", f"comm.bucket_mb={bucket_cap_mb}")
            comm = dataclasses.replace(comm, bucket_mb=checked.comm.bucket_mb)
        whole = dataclasses.replace(session.config, comm=comm, compress=coded)
        if problems := configuration.contradictions(whole):
            raise ConfigError([f"{keys[0]}: {text}" for keys, text in problems])
        shared = session.config.topology.share_devices
        binding.agree_on_places(session.runtime, module, share=shared)
        collectives = session.reach(module.parameters()).collectives
        if not collectives.device.queued:
            asked = comm.node_transport, comm.rail_transport
            session.runtime.agreed(lambda: routes.check_host(*asked))
        super().__init__(
            module,
            runtime=session.runtime,
            comm=comm,
            compress=coded,
            seed=session.config.run.seed,
            collectives=collectives,
            broadcast_buffers=broadcast_buffers,
        )


def _check(argument: str, setting: str) -> configuration.Config:
    """A deck of one setting; what is wrong with it is wrong with ``argument``."""
    try:
        return configuration.load(None, [setting])
    except ConfigError as error:
        key = setting.partition("=")[0]
        raise ConfigError(
            [
                f"{argument}: {problem.removeprefix(f'command line: {key}: ')}"
                for problem in error.problems
            ]
        ) from None


def allreduce(tensor: Tensor, op: Op = Average) -> Tensor:
    """A new tensor with the average, sum, minimum or maximum of the ranks' tensors.

    It is outside autograd: no gradient flows through it, and the result asks for none.

    Args:
        tensor: any shape, the same on every rank; float16, bfloat16 (added in float32), float32,
            float64 or integers, in the memory of the host or of this rank's device. With
            ``Sum`` and ``Average`` the host does not wait for a device's sums.

    Raises:
        DeviceError: the tensor's device cannot be used.
        LaunchError: other ranks' tensors are on another kind of device.
        ValueError: a dtype that cannot be reduced, the average of integers, or another ``op``.
    """
    return allreduce_(tensor.detach().clone(memory_format=torch.contiguous_format), op)


def allreduce_(tensor: Tensor, op: Op = Average) -> Tensor:
    """``allreduce`` in place; returns ``tensor``, which must be contiguous. Outside autograd, too.

    Raises:
        ValueError: as ``allreduce``, or the tensor is not contiguous.
    """
    session = _current()
    if not isinstance(op, Op):
        raise ValueError(f"allreduce: op={op!r} is none of Average, Sum, Min, Max of hpcsync")
    name = dtype_of(tensor.dtype).name
    data = _bytes(tensor)
    if op is Op.AVERAGE and not tensor.is_floating_point():
        raise ValueError(f"allreduce: the average of {name} is not whole; use op=hpcsync.Sum")
    if op in (Op.AVERAGE, Op.SUM):
        session.reach([tensor]).eager.allreduce(data, name, average=op is Op.AVERAGE)
        return tensor
    with torch.no_grad():
        low = tensor.dtype in (torch.float16, torch.bfloat16)
        wide = (tensor.float() if low else tensor).detach().cpu().flatten()
        session.runtime.allreduce_array(wide.numpy(), op.value)
        return tensor.copy_(wide.view(tensor.shape))


def _bytes(tensor: Tensor) -> Tensor:
    known = ("cpu", *DEVICES)
    if not tensor.is_contiguous() or tensor.device.type not in known:
        raise ValueError(
            f"allreduce: the tensor must be contiguous, and on one of: {', '.join(known)}"
        )
    return tensor.detach().flatten().view(torch.uint8)


def broadcast(tensor: Tensor, root: int = 0) -> Tensor:
    """The tensor of rank ``root``, put into ``tensor`` (same shape and dtype on every rank)."""
    data_parallel.broadcast_tensors(_current().runtime, [tensor], root)
    return tensor


def broadcast_parameters(
    source: nn.Module | Mapping[str, Any] | Iterable[tuple[str, Tensor]], root: int = 0
) -> None:
    """Set parameters to those of rank ``root``, in place.

    Args:
        source: a module (buffers too), its ``state_dict()`` or ``named_parameters()``.
    """
    if isinstance(source, nn.Module):
        source = source.state_dict()
    pairs = source.items() if isinstance(source, Mapping) else source
    tensors = [value for _, value in pairs if isinstance(value, Tensor)]
    data_parallel.broadcast_tensors(_current().runtime, tensors, root)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root: int = 0) -> None:
    """Set an optimizer's state to that of rank ``root``, in place."""
    runtime = _current().runtime
    mine = tree_map(_on_host, optimizer.state_dict()) if runtime.rank == root else None
    state = runtime.bcast(mine, root)
    if runtime.rank != root:
        optimizer.load_state_dict(state)


def _on_host(value: Any) -> Any:
    """Another rank's GPU may have another number."""
    return value.cpu() if isinstance(value, Tensor) else value


def broadcast_object(value: Any, root: int = 0) -> Any:
    """The picklable ``value`` of rank ``root``, on every rank."""
    return _current().runtime.bcast(value, root)


def allgather_object(value: Any) -> list[Any]:
    """The picklable ``value`` of every rank, by rank."""
    return _current().runtime.allgather_object(value)


def barrier() -> None:
    """Wait for all ranks."""
    _current().runtime.barrier()
