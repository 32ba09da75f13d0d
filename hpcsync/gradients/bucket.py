"""A bucket: one flat buffer that the node shares, the gradients as views into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..collectives import Collectives
from ..device import dtype_of
from .plan import BucketPlan


class Bucket:
    """Gradients that travel together.

    Attributes:
        views: for each parameter of the plan, its gradient's place in the buffer, with the
            parameter's shape and strides.
        pending: parameters whose gradient has not come in this backward pass.
        launched: whether the exchange of this backward pass has been started.
    """

    def __init__(
        self, plan: BucketPlan, params: Sequence[nn.Parameter], collectives: Collectives
    ) -> None:
        self.plan = plan
        self.params = [params[index] for index in plan.params]
        self.pending = len(self.params)
        self.launched = False
        self._alone = collectives.runtime.size == 1
        buffer = collectives.buffer(plan.nbytes)
        self._flat = torch.from_numpy(buffer.own).view(getattr(torch, plan.dtype))
        self.views = [
            self._flat[offset : offset + param.numel()].as_strided(
                param.size(), _strides(param), storage_offset=offset
            )
            for param, offset in zip(self.params, plan.offsets, strict=True)
        ]
        self._used = self._flat[plan.used_offset :]
        self.collective = collectives.allreduce(
            buffer, dtype_of(plan.dtype), average=True, label=f"bucket {plan.index}"
        )

    def holds(self, slot: int) -> bool:
        """Whether the parameter's gradient is the view of this bucket."""
        grad = self.params[slot].grad
        return (
            grad is not None
            and grad.layout is torch.strided
            and grad.data_ptr() == self.views[slot].data_ptr()
        )

    def adopt(self, slot: int) -> None:
        """Move a gradient that stands elsewhere into its view, and make the view the gradient.

        ``zero_grad(set_to_none=True)`` leaves autograd to make a new tensor; copying it while it
        is in cache costs less than zeroing the view and adding to it.
        """
        grad = self.params[slot].grad
        assert grad is not None
        if not self.holds(slot):
            self.views[slot].copy_(grad if grad.layout is torch.strided else grad.to_dense())
            self.params[slot].grad = self.views[slot]

    def launch(self, used: Sequence[bool], priority: int) -> None:
        """Start the exchange; ``used`` says for each parameter whether this rank has a gradient."""
        self.launched = True
        if self._alone:
            return
        if all(used):
            self._used.fill_(1)
        else:
            self._used.copy_(torch.tensor(used, dtype=self._used.dtype))
        self.collective.start(priority)

    def used_anywhere(self, slot: int) -> bool:
        """After the exchange: whether any rank had a gradient of the parameter."""
        return bool(self._used[slot] > 0)

    def reset(self) -> None:
        """Be ready for the next backward pass."""
        self.pending = len(self.params)
        self.launched = False


def _strides(param: Tensor) -> tuple[int, ...]:
    """The parameter's own strides where its elements fill memory densely, else row-major."""
    order = sorted(range(param.dim()), key=param.stride, reverse=True)
    expected = 1
    for axis in reversed(order):
        if param.size(axis) != 1 and param.stride(axis) != expected:
            return torch.empty(param.size(), device="meta").stride()
        expected *= param.size(axis)
    return param.stride()
