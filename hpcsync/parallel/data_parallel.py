"""Data parallelism: every rank has the whole model and a share of the batch."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..collectives import Collectives
from ..config import CommConfig, CompressConfig
from ..errors import ConfigError, UserError
from ..gradients.bucket import Transform
from ..gradients.checks import check_same
from ..gradients.compression import Compression
from ..gradients.reducer import Reducer
from ..launch import Runtime
from ..trace.recorder import Recorder
from .buffers import DeviceBuffers
from .placement import collectives_on, device_of


class DataParallel(nn.Module):
    """A module whose gradients are averaged over all ranks during the backward pass.

    Parameters and buffers are set to those of rank 0 when it is made. After ``backward()`` every
    rank has the same gradients, so the training loop and the optimizer stay as they are.

    Args:
        module: the same on every rank, on one device.
        runtime: the job.
        comm: how to exchange; the defaults of the deck if not given.
        compress: how gradients are coded; not at all if not given.
        seed: of all that is random in coding.
        transform: makes what is exchanged in place of gradients, e.g. an optimizer's momentum.
        collectives: to share one with others; made if not given.
        broadcast_buffers: set buffers (running means, say) to rank 0's before each forward pass
            in training; broadcast them before a rank's own evaluation.
        recorder: of this rank's times, where no ``collectives`` are given; made if not given.

    Raises:
        DeviceError: the module's device cannot be used.
        ModelError: the ranks' modules differ, or its parameters are not all on one device.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        runtime: Runtime,
        comm: CommConfig | None = None,
        compress: CompressConfig | None = None,
        seed: int = 0,
        transform: Transform | None = None,
        collectives: Collectives | None = None,
        broadcast_buffers: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__()
        comm = comm or CommConfig()
        self.module = module
        self.broadcast_buffers = broadcast_buffers
        check_same(runtime, [*module.named_parameters(), *module.named_buffers()])
        self.collectives = collectives or collectives_on(
            runtime, comm, device_of(module.parameters()), recorder
        )
        compression = _compression(self.collectives, compress, seed)
        self.reducer = Reducer(
            list(module.named_parameters()),
            self.collectives,
            comm,
            compression,
            transform,
            auto=compress is not None and compress.codec == "auto",
        )
        # The garbage collector sees no cycle that goes through a hook; nobody needs them any more.
        weakref.finalize(module, self.reducer.unhook).atexit = False
        with torch.no_grad():
            broadcast_tensors(runtime, [*module.parameters(), *module.buffers()])
        self._on_device: DeviceBuffers | None = None
        trained = self.reducer.layout.params
        if self.collectives.device.queued and runtime.size > 1 and trained:
            self._on_device, self._where = DeviceBuffers(self.collectives), trained[0].device
            if broadcast_buffers:
                self._on_device.prepare(self._split_buffers()[0])

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The module's own forward pass."""
        if torch.is_grad_enabled() and "reducer" in self.__dict__:
            self.reducer.prepare(list(self.module.named_parameters()))
            if self.training and self.broadcast_buffers and self.reducer.syncing:
                self._broadcast_buffers()
        return self.module(*inputs, **keywords)

    def close(self) -> None:
        """Stop averaging; the module goes on as it is, on this rank alone."""
        self.reducer.close()
        del self.reducer
        if self._on_device is not None:
            self._on_device.close()

    def __getstate__(self) -> dict[str, Any]:
        """For ``copy.deepcopy`` and ``torch.save``: a copy has the module, but averages nothing."""
        state = self.__dict__.copy()
        state.pop("reducer", None)
        state.pop("collectives", None)
        state.pop("_on_device", None)
        return state

    def no_sync(self) -> AbstractContextManager[None]:
        """Backward passes in this context only add up; the next one outside exchanges the sum.

        The forward pass belongs inside the context, too.
        """
        return self.reducer.no_sync()

    def norm(self) -> Tensor:
        """Global 2-norm of the averaged gradients, a scalar; the same on every rank."""
        return self.reducer.norm()

    def rescale(self, factor: float) -> None:
        """Gradients come ``factor`` times as large from now on: what codecs hold back follows."""
        self.reducer.rescale(factor)

    def finite(self) -> bool:
        """Whether no averaged gradient holds NaN or Inf; the same on every rank."""
        return self.reducer.finite()

    def _broadcast_buffers(self) -> None:
        """Set the buffers to rank 0's."""
        there, elsewhere = self._split_buffers()
        if self._on_device is not None:
            self._on_device.broadcast(there)
        broadcast_tensors(self.collectives.runtime, elsewhere)

    def _split_buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those in the memory of the gradients' device, and others."""
        # Past autograd's eyes: a forward pass before this one may have saved buffers for the
        # backward pass of both, as batch normalisation does without using them.
        values = [buffer.data for buffer in self.module.buffers()]
        if self._on_device is None:
            return [], values
        there = [each for each in values if each.device == self._where]
        return there, [each for each in values if each.device != self._where]


def _compression(
    collectives: Collectives, config: CompressConfig | None, seed: int
) -> Compression | None:
    """What ``config`` asks for, if it is the same on all ranks; collective."""
    problem: UserError | None = None
    made: Compression | None = None
    runtime = collectives.runtime
    reference = runtime.bcast((config, seed))
    if reference != (config, seed):
        here, there = (each.codec if each else "none" for each in (config, reference[0]))
        what = f"codec {here} here, {there}" if here != there else "other settings here than"
        problem = ConfigError(
            f"compress: the ranks disagree: {what} on rank 0; give all ranks the same deck"
        )
    elif config is not None and config.codec != "none":
        try:
            made = Compression(collectives, config, seed)
        except UserError as error:
            problem = error
    runtime.agree(problem)
    return made


def broadcast_tensors(runtime: Runtime, tensors: list[Tensor], root: int = 0) -> None:
    """Set the tensors to those of rank ``root``, in place; same shapes and dtypes on all ranks.

    Small tensors travel together. Those of a device go through the host, which waits for it.
    """
    if runtime.size == 1:
        return
    group: list[Tensor] = []
    nbytes = 0
    for tensor in tensors:
        if group and tensor.device != group[0].device:
            _broadcast_packed(runtime, group, root)
            group, nbytes = [], 0
        group.append(tensor)
        nbytes += tensor.numel() * tensor.element_size()
        if nbytes >= 1 << 24:
            _broadcast_packed(runtime, group, root)
            group, nbytes = [], 0
    if group:
        _broadcast_packed(runtime, group, root)


def _broadcast_packed(runtime: Runtime, tensors: list[Tensor], root: int) -> None:
    with torch.no_grad():
        parts = [each.detach().contiguous().flatten().view(torch.uint8) for each in tensors]
        packed = torch.cat(parts)
        host = torch.empty(packed.shape, dtype=torch.uint8).copy_(packed)
        runtime.broadcast_array(host.numpy(), root)
        if runtime.rank == root:
            return
        packed.copy_(host)
        for tensor, part in zip(
            tensors, torch.split(packed, [each.numel() for each in parts]), strict=True
        ):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
