"""A bucket: one flat buffer that the node shares, the gradients as views into it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..collectives import Collectives
from ..collectives.coding import Coding
from ..collectives.kept import Keeper, Plain, cut
from ..config import CommConfig
from ..device import dtype_of
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
        self._region = Region(arena, offset, plan.numel, dtype_of(plan.dtype))
        memory = arena.own[offset : offset + plan.nbytes]
        self._flat = torch.from_numpy(memory).view(getattr(torch, plan.dtype))
        self.views = [
            self._flat[start : start + param.numel()].as_strided(
                param.size(),
                dense_strides(param),
                storage_offset=start + self._flat.storage_offset(),
            )
            for param, start in zip(self.params, plan.offsets, strict=True)
        ]
        self._used = self._flat[plan.used_offset :]
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
        grad = self.params[slot].grad
        assert grad is not None
        if transform is not None and transform.active:
            dense = grad if grad.layout is torch.strided else grad.to_dense()
            transform.apply(self.params[slot], dense, self.views[slot])
            self.params[slot].grad = self.views[slot]
        elif not self.holds(slot):
            self.views[slot].copy_(grad if grad.layout is torch.strided else grad.to_dense())
            self.params[slot].grad = self.views[slot]

    def launch(self, used: Sequence[bool], priority: int, *, failed: bool = False) -> None:
        """Start the exchange.

        Args:
            used: for each parameter, whether this rank has a gradient.
            failed: tell the other ranks that this one has none to give.
        """
        self.launched = True
        if self._alone:
            return
        if failed:
            self._used.fill_(math.nan)
        elif all(used):
            self._used.fill_(1)
        else:
            self._used.copy_(torch.tensor(used, dtype=self._used.dtype))
        self.collective.start(priority)

    def used_anywhere(self, slot: int) -> bool:
        """After the exchange: whether any rank had a gradient of the parameter."""
        return bool(self._used[slot] > 0)

    def failed_anywhere(self) -> bool:
        """After the exchange: whether a rank had to give up in its backward pass."""
        return not self._alone and bool(torch.isnan(self._used[0]))

    def keepers(self, rank: int, ranks: int) -> list[Keeper]:
        """What this rank keeps of the means, from the next exchange on: of what is coded, what its
        collective says; of the rest, an equal share for each rank."""
        coded = min(self.collective.coded, self.plan.used_offset)
        share = cut(self.plan.used_offset - coded, rank, ranks)
        found = self.collective.keepers()
        if share.start < share.stop:
            found.append(Plain(self._region, 0, coded + share.start, coded + share.stop))
        return found

    def reset(self) -> None:
        """Be ready for the next backward pass."""
        self.pending = len(self.params)
        self.launched = False
        self.filling = 0


def dense_strides(param: Tensor) -> tuple[int, ...]:
    """The parameter's own strides where its elements fill memory densely, else row-major."""
    order = sorted(range(param.dim()), key=param.stride, reverse=True)
    expected = 1
    for axis in reversed(order):
        if param.size(axis) != 1 and param.stride(axis) != expected:
            return torch.empty(param.size(), device="meta").stride()
        expected *= param.size(axis)
    return param.stride()
