"""Small models, what each rank's loss is in each step, and what their gradients should be.

For tests of DataParallel that run on the ranks of an MPI job.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from hpcsync.models.convnet import ConvNet
from hpcsync.models.gpt import GPT
from hpcsync.parallel import DataParallel

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
LAST = SIZE - 1
KIB = 1 / 1024
MINE = 3  # samples a rank and step

Wrap = Callable[..., DataParallel]
Batch = tuple[Tensor, Tensor]


class Mixture(nn.Module):
    """A trunk and four branches; which branch a sample takes is up to the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 10)
        self.branches = nn.ModuleList(nn.Linear(10, 4) for _ in range(4))
        self.never = nn.Linear(3, 3)

    def forward(self, inputs: Tensor, branch: int) -> Tensor:
        out: Tensor = self.branches[branch](torch.tanh(self.trunk(inputs)))
        return out


class Perceptron(nn.Module):
    def __init__(self, sizes: tuple[int, ...] = (6, 40, 30, 4)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(one, other) for one, other in itertools.pairwise(sizes)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return inputs


def made(build: Callable[[], nn.Module], seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def gpt() -> nn.Module:
    return made(lambda: GPT(vocab=40, context=8, layers=2, width=16, heads=2, hidden=32))


def convnet() -> nn.Module:
    return made(lambda: ConvNet(channels=1, classes=5, layers=3, width=8))


def tokens(step: int, rank: int) -> Batch:
    drawn = torch.Generator().manual_seed(1000 * step + rank)
    text = torch.randint(0, 40, (MINE, 9), generator=drawn)
    return text[:, :-1], text[:, 1:]


def pictures(step: int, rank: int) -> Batch:
    drawn = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.randn(MINE, 1, 8, 8, generator=drawn)
    return images, torch.randint(0, 5, (MINE,), generator=drawn)


def vectors(step: int, rank: int) -> Tensor:
    drawn = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(MINE, 6, generator=drawn)


Loss = Callable[[nn.Module, int, int], Tensor]


def gpt_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    loss: Tensor = model(*tokens(step, rank))
    return loss


def convnet_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    loss: Tensor = model(*pictures(step, rank))
    return loss


def mixture_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    """Branch 0 is used by all ranks, 1 by odd ones, 2 by rank 0 in odd steps, 3 by nobody."""
    inputs = vectors(step, rank)
    loss: Tensor = model(inputs, 0).square().mean()
    if rank % 2:
        loss = loss + model(inputs, 1).abs().mean()
    if rank == 0 and step % 2:
        loss = loss + model(inputs, 2).sum()
    return loss


def square_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    loss: Tensor = model(vectors(step, rank).to(next(model.parameters()).dtype)).square().mean()
    return loss


CASES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "gpt": (gpt, gpt_loss),
    "convnet": (convnet, convnet_loss),
    "mixture": (lambda: made(Mixture), mixture_loss),
    "perceptron": (lambda: made(Perceptron), square_loss),
}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies, by the name in the wrapped module."""
    return {
        name.removeprefix("module."): None if param.grad is None else param.grad.detach().clone()
        for name, param in model.named_parameters()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): value.detach().clone()
        for name, value in model.state_dict().items()
    }


def close(
    ours: dict[str, Any], theirs: dict[str, Any], rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), name
        if value is not None:
            torch.testing.assert_close(
                value, other, rtol=rtol, atol=atol, msg=f"{name}\n{value}\n{other}"
            )


def same_bits(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            assert torch.equal(value, other), name


def same_on_all_ranks(found: dict[str, Tensor | None]) -> None:
    everyone = WORLD.allgather(found)
    for other in everyone:
        same_bits(found, other)


def mean_of_ranks(model: nn.Module, loss: Loss, step: int) -> dict[str, Tensor | None]:
    """What the gradients should be: every rank's share in turn, in this one process."""
    sums: dict[str, Tensor | None] = {}
    for rank in range(SIZE):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        loss(alone, step, rank).backward()
        for name, grad in gradients(alone).items():
            old = sums.get(name)
            sums[name] = grad if old is None else old if grad is None else old + grad
    return {name: None if grad is None else grad / SIZE for name, grad in sums.items()}


def follows_the_mean(
    ours: DataParallel, loss: Loss, steps: int = 3, rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """In each of some steps this rank's gradients become the mean over all ranks."""
    for step in range(steps):
        ours.zero_grad()
        loss(ours, step, RANK).backward()
        close(gradients(ours), mean_of_ranks(ours.module, loss, step), rtol, atol)
