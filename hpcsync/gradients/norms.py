"""Norms of gradients that all ranks hold alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = (torch.float16, torch.bfloat16)


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """2-norm of all tensors as one: a float32 scalar, float64 if any of them is.

    Low precision is squared and added in float32: in float16 a norm overflows at 65504.
    """
    low = any(grad.dtype in _LOW for grad in grads)
    if low or not grads:
        norms = [
            torch.linalg.vector_norm(grad, dtype=torch.float32 if grad.dtype in _LOW else None)
            for grad in grads
        ]
    else:  # one kernel for many of them
        norms = list(torch._foreach_norm(list(grads)))
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.cat([norm.view(1) for norm in norms]))
    return total
