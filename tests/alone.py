"""A small model on one rank, as the engine takes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcsync.gradients.norms import total_norm


class Net(nn.Module):
    """A small regression, always with the same weights."""

    def __init__(self, inputs: int = 6, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.out = nn.Linear(inputs, width), nn.Linear(width, 1)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.out(torch.tanh(self.inner(inputs))), targets)


class Alone(nn.Module):
    """DataParallel on one rank: nothing to exchange.

    Attributes:
        quiet: how often ``no_sync`` was entered.
        factors: in what units gradients came.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.quiet = 0
        self.factors: list[float] = []

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.module(inputs, targets)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.quiet += 1
        yield

    def norm(self) -> Tensor:
        return total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    def rescale(self, factor: float) -> None:
        self.factors.append(factor)
