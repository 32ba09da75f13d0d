"""A bucket: one flat buffer that the node shares, the gradients as views into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from ..collectives import Collectives
from ..collectives.coding import Coding
from ..collectives.kept import Keeper, Plain, cut
from ..config import CommConfig
from ..device import Event, Stream, dtype_of
from ..transports.base import Buffer, Region
from .plan import BucketPlan


class Transform(Protocol):
    """Makes what is exchanged in place of a gradient, such as an optimizer's momentum."""

    @property
    def active(self) -> bool: ...

    def apply(self, param: nn.Parameter, grad: Tensor, out: Tensor) -> None:
        """Write it to ``out``, which may be ``grad``."""


class Bucket:
    """Gradients that travel together.

    Attributes:
        views: for each parameter of the plan, its gradient's place in the buffer, with the
            parameter's shape and strides.
        pending: parameters whose gradient has not come in this backward pass.
        launched: whether the exchange of this backward pass has been started.
        filling: when the first gradient of this backward pass came, or 0.
        flags: room for one element a parameter at the end of the buffer; see ``flags``.
    """

    def __init__(
        self,
        plan: BucketPlan,
        params: Sequence[nn.Parameter],
        collectives: Collectives,
        arena: Buffer,
        offset: int,
        coding: Coding | None = None,
        comm: CommConfig | None = None,
    ) -> None:
        """Lay the bucket out from byte ``offset`` of ``arena`` on; the same calls on all ranks.

        ``coding`` says how its coded parameters travel.
        """
        self.plan = plan
        self.params = [params[index] for index in plan.params]
        self.pending = len(self.params)
        self.launched = False
        self.filling = 0
        self._alone = collectives.runtime.size == 1
        self._device = collectives.device
        self._streams: list[Stream] = []  # that gradients of this backward pass came in,
        self._events: list[Event] = []  # and where the computation left the last of them
        self._region = Region(arena, offset, plan.numel, dtype_of(plan.dtype))
        memory = arena.own[offset : offset + plan.nbytes]
        self._flat = from_dlpack(memory).view(getattr(torch, plan.dtype))
        self.views = [
            self._flat[start : start + param.numel()].as_strided(
                param.size(),
                dense_strides(param),
                storage_offset=start + self._flat.storage_offset(),
            )
            for param, start in zip(self.params, plan.offsets, strict=True)
        ]
        self.flags = self._flat[plan.used_offset :]
        self.collective = collectives.allreduce(
            arena,
            dtype_of(plan.dtype),
            count=plan.numel,
            offset=offset,
            average=True,
            label=f"bucket {plan.index}",
            bucket=plan.index,
            coding=coding,
            config=comm,
        )

    def holds(self, slot: int) -> bool:
        """Whether the parameter's gradient is the view of this bucket."""
        grad = self.params[slot].grad
        return (
            grad is not None
            and grad.layout is torch.strided
            and grad.data_ptr() == self.views[slot].data_ptr()
        )

    def adopt(self, slot: int, transform: Transform | None = None) -> None:
        """Move a gradient that stands elsewhere into its view, and make the view the gradient.

        ``zero_grad(set_to_none=True)`` leaves autograd to make a new tensor; copying it while it
        is in cache costs less than zeroing the view and adding to it.

        Args:
            transform: what is exchanged in place of the gradient.
        """
        param, view = self.params[slot], self.views[slot]
        grad = param.grad
        assert grad is not None
        stream = self._here()
        if transform is not None and transform.active:
            given, made = grad, transform
            stream.apply(lambda: made.apply(param, _dense(given), view))
            param.grad = view
        elif not self.holds(slot):
            given = grad
            stream.apply(lambda: view.copy_(_dense(given)))
            param.grad = view

    def zero(self, slot: int, transform: Transform | None = None) -> None:
        """Take part with zeros for a parameter that has no gradient here, or what the transform
        makes of them."""
        view, param = self.views[slot], self.params[slot]
        stream = self._here()
        stream.apply(view.zero_)
        if transform is not None and transform.active:
            made = transform
            stream.apply(lambda: made.apply(param, view, view))

    def _here(self) -> Stream:
        """The stream that the computation is in; a change of it is noted."""
        stream = self._device.current()
        if self._device.queued and stream not in self._streams[-1:]:
            if self._streams:
                self._events.append(self._streams[-1].record())
            self._streams.append(stream)
        return stream

    def launch(self, priority: int) -> None:
        """Start the exchange."""
        self.launched = True
        if self._alone:
            return
        after: list[Event] = []
        if self._device.queued:
            after = [*self._events, self._here().record()]
        self.collective.start(priority, after)

    def join(self) -> None:
        """Once the exchange was waited for: let the computation go on with the means."""
        self.collective.join(self._device.current())

    def keepers(self, rank: int, ranks: int) -> list[Keeper]:
        """What this rank keeps of the means, from the next exchange on: of what is coded, what its
        collective says; of the rest, an equal share for each rank."""
        coded = min(self.collective.coded, self.plan.used_offset)
        share = cut(self.plan.used_offset - coded, rank, ranks)
        found = self.collective.keepers()
        if share.start < share.stop:
            stream = self._device.current() if self._device.queued else None
            region = replace(self._region, stream=stream)  # which has joined the exchange
            found.append(Plain(region, 0, coded + share.start, coded + share.stop))
        return found

    def reset(self) -> None:
        """Be ready for the next backward pass."""
        self.pending = len(self.params)
        self.launched = False
        self.filling = 0
        self._streams, self._events = [], []


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout is torch.strided else grad.to_dense()


def dense_strides(param: Tensor) -> tuple[int, ...]:
    """The parameter's own strides where its elements fill memory densely, else row-major."""
    order = sorted(range(param.dim()), key=param.stride, reverse=True)
    expected = 1
    for axis in reversed(order):
        if param.size(axis) != 1 and param.stride(axis) != expected:
            return torch.empty(param.size(), device="meta").stride()
        expected *= param.size(axis)
    return param.stride()
