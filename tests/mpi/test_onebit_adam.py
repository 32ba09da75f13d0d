"""1-bit Adam over ranks: what is exchanged is momentum, made once a step on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor, nn

from hpcsync.config import CommConfig, CompressConfig
from hpcsync.launch import Runtime
from hpcsync.onebit_adam import OneBitAdam
from hpcsync.parallel import DataParallel
from hpcsync.topology import Topology

pytestmark = pytest.mark.mpi

WORLD = MPI.COMM_WORLD
RANK, SIZE = WORLD.rank, WORLD.size
FREEZE, STEPS, MINE = 4, 12, 4  # MINE: samples a rank and step
Wrap = Callable[..., DataParallel]


@pytest.fixture
def wrap() -> Iterator[Wrap]:
    """Wraps a model whose optimizer is given, on nodes of one rank."""
    runtimes: list[Runtime] = []

    def make(model: nn.Module, optimizer: OneBitAdam, codec: str = "none") -> DataParallel:
        runtime = Runtime(WORLD.Dup(), Topology.group(["host"] * SIZE, 1), 60.0)
        runtimes.append(runtime)
        sizes: dict[str, Any] = {"bucket_mb": 1 / 1024, "first_bucket_mb": 1 / 1024}
        return DataParallel(
            model,
            runtime=runtime,
            comm=CommConfig(**sizes, timeout_s=60.0),
            compress=CompressConfig(codec=codec, rank=1, warmup=FREEZE, min_elements=0),
            transform=optimizer.momentum,
        )

    yield make
    for runtime in runtimes:
        runtime.close()


class Branches(nn.Module):
    """Each sample takes one of two branches, so that ranks may leave one out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 12)
        self.branches = nn.ModuleList(nn.Linear(12, 3) for _ in range(2))

    def forward(self, inputs: Tensor, taken: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(inputs))
        losses = [
            (branch(hidden[taken == index]) ** 2).sum() if (taken == index).any() else None
            for index, branch in enumerate(self.branches)
        ]
        total = [loss for loss in losses if loss is not None]
        return torch.stack(total).sum() / len(inputs)


def made() -> tuple[Branches, OneBitAdam]:
    torch.manual_seed(1)
    model = Branches()
    return model, OneBitAdam(model.parameters(), lr=0.05, betas=(0.9, 0.95), freeze=FREEZE)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Samples of a rank; on odd steps each rank takes one branch only, the first for most."""
    random = torch.Generator().manual_seed(100 * step + rank)
    inputs = torch.randn(MINE, 6, generator=random)
    taken = torch.randint(2, (MINE,), generator=random)
    return inputs, torch.full((MINE,), int(rank == 0)) if step % 2 else taken


def alone() -> Branches:
    """One process with all ranks' samples, on gradients: momentum is linear in these."""
    model, optimizer = made()
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(SIZE):
            (model(*batch(step, rank)) / SIZE).backward()
        if optimizer.momentum.active:
            for param in model.parameters():
                if param.grad is not None:
                    optimizer.momentum.apply(param, param.grad, param.grad)
        optimizer.step()
    return model


@pytest.mark.parametrize("pieces", [1, 2])
def test_ranks_train_as_one_process(wrap: Wrap, pieces: int) -> None:
    model, optimizer = made()
    parallel = wrap(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, taken = batch(step, RANK)
        parts = list(zip(inputs.chunk(pieces), taken.chunk(pieces), strict=True))
        with parallel.no_sync():
            for part in parts[:-1]:
                (parallel(*part) / pieces).backward()
        (parallel(*parts[-1]) / pieces).backward()
        optimizer.step()
    assert optimizer.momentum.active
    for param, expected in zip(model.parameters(), alone().parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codec", ["onebit", "int8", "powersgd"])
def test_momentum_is_the_same_on_all_ranks_after_coding(wrap: Wrap, codec: str) -> None:
    model, optimizer = made()
    parallel = wrap(model, optimizer, codec)
    for step in range(STEPS):
        optimizer.zero_grad()
        parallel(*batch(step, RANK)).backward()
        optimizer.step()
    for param in model.parameters():
        state = optimizer.state[param]
        found = [param.detach(), state["exp_avg"], state["denominator"]]
        for values in found:
            assert torch.isfinite(values).all()
            assert all(torch.equal(values, other) for other in WORLD.allgather(values))
