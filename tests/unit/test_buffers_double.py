"""Buffers of a model on the test double: rank 0's bits on all ranks, and nobody waits for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcsync.collectives.routes import Facts
from hpcsync.config import CommConfig
from hpcsync.parallel import DataParallel
from hpcsync.parallel.buffers import DeviceBuffers
from tests.double.job import Rank, job
from tests.double.queued import Queued, placed, to_device
from tests.double.streams import DoubleEvent

STEPS = 4
COMM = CommConfig(bucket_mb=0.0005, first_bucket_mb=0.0002)
WAYS = {"ipc": Facts(), "staged": Facts(cuda_ipc="not here")}

pytestmark = pytest.mark.usefixtures("one_thread")


class Normed(nn.Module):
    """Keeps a running mean by operations in place, as batch normalisation does.

    Ranks that are threads draw from one generator: models are made before they start.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(6, 5)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("none", torch.zeros(0))

    def forward(self, inputs: Tensor) -> Tensor:
        made = self.layer(inputs)
        with torch.no_grad():
            self.mean.mul_(0.5).add_(made.mean(0), alpha=0.5)
            self.count.add_(1)
        return F.mse_loss(made - self.mean, torch.ones_like(made))


def wrapped(rank: Rank, model: nn.Module, **how: Any) -> DataParallel:
    collectives = rank.collectives(COMM, **how)
    return DataParallel(model, runtime=rank.runtime, comm=COMM, collectives=collectives)


def batch(step: int, rank: int) -> Tensor:
    drawn = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 6, generator=drawn)


@contextlib.contextmanager
def host_waits() -> Iterator[list[int]]:
    """Grows each time that a host sleeps for a device."""
    found: list[int] = []
    sleeps = DoubleEvent.synchronize

    def synchronize(event: DoubleEvent) -> None:
        found.append(1)
        sleeps(event)

    with mock.patch.object(DoubleEvent, "synchronize", synchronize):
        yield found


def on_host(rank: Rank, model: nn.Module) -> list[np.ndarray]:
    ours = wrapped(rank, model, device=False)
    for step in range(STEPS):
        ours(batch(step, rank.rank)).backward()
    return [each.numpy().copy() for each in ours.buffers()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_a_forward_pass_with_buffers_waits_for_nothing(seed: int, way: str) -> None:
    def build(rank: Rank) -> DataParallel:
        with Queued(rank.device):
            return wrapped(rank, to_device(models[2 + rank.rank], rank.device), facts=WAYS[way])

    def train(rank: Rank) -> None:
        ours = built[rank.rank]
        with Queued(rank.device) as mode:
            for step in range(STEPS):
                ours(placed(batch(step, rank.rank), rank.device)).backward()
        assert not mode.asked, mode.asked[0]

    models = [Normed() for _ in range(4)]
    with job(2, seed, per_node=2) as made:
        expected = made.run(lambda rank: on_host(rank, models[rank.rank]))
    with job(2, seed, per_node=2) as made:
        built = made.run(build)
        with host_waits() as waits:
            made.run(train)
        assert not waits
        for rank, ours in zip(made.ranks, built, strict=True):
            found = [rank.device.read(each) for each in ours.buffers()]
            assert all(map(np.array_equal, found, expected[rank.rank]))
    assert int(expected[1][1]) == STEPS
    assert not np.array_equal(expected[0][0], expected[1][0])  # rank 0's, and a batch of its own


def drawn(rank: int) -> list[Tensor]:
    """Tensors of many types, other ones on each rank; what is no number is among them."""
    told = torch.tensor([-0.0, torch.nan, torch.inf, 1e-45, rank], dtype=torch.float32)
    nan = torch.tensor([0x7F800001 + rank, -0x7FFFFF - rank], dtype=torch.int32)
    return [
        told if rank == 0 else -told,
        nan.view(torch.float32),
        told.bfloat16() if rank == 0 else told.half().view(torch.bfloat16),
        torch.full((3, 1), 6e4 - rank).half(),
        torch.arange(7, dtype=torch.uint8).add(rank).view(torch.float8_e4m3fn),
        torch.tensor(-(2**62) + rank),
        torch.tensor([rank == 0, rank == 1, True]),
        torch.full((2,), complex(rank, -0.0)),
        torch.full((2,), complex(-0.0, rank), dtype=torch.complex128),
        torch.zeros(0, 4),
    ]


def bits(each: Tensor) -> Tensor:
    return each.contiguous().view(-1).view(torch.uint8)


def test_bits_of_all_types_are_rank_0s() -> None:
    def body(rank: Rank) -> list[np.ndarray]:
        sender = DeviceBuffers(rank.collectives())
        mine = [placed(each, rank.device) for each in drawn(rank.rank)]
        mine.append(placed(torch.arange(6.0).add(rank.rank).view(2, 3), rank.device).t())
        with Queued(rank.device):
            sender.broadcast(mine)
            found = [bits(each).clone() for each in mine]
        return [rank.device.read(each) for each in found]

    wanted = [bits(each).numpy() for each in drawn(0)]
    wanted.append(bits(torch.arange(6.0).view(2, 3).t()).numpy())
    with job(4, 3, per_node=2) as made:
        for found in made.run(body):
            assert all(map(np.array_equal, found, wanted))


def test_buffers_may_change_and_come_and_go() -> None:
    """Memory is taken anew, once the device has done with the old one."""

    def body(rank: Rank) -> list[np.ndarray]:
        sender = DeviceBuffers(rank.collectives())
        found = []
        for count in (5, 0, 5000, 5000, 3):
            mine = [placed(torch.full((count,), float(rank.rank + 1)), rank.device)]
            with Queued(rank.device):
                sender.broadcast(mine)
                sender.broadcast([])
            found.append(mine[0])
        read = [rank.device.read(each) for each in found]
        sender.close()
        return read

    with job(2, 4, per_node=2) as made:
        for found in made.run(body):
            assert [each.shape[0] for each in found] == [5, 0, 5000, 5000, 3]
            assert all((each == 1).all() for each in found)


def test_a_copy_of_the_wrapper_holds_the_module_alone() -> None:
    def body(rank: Rank) -> None:
        with Queued(rank.device):
            ours = wrapped(rank, to_device(Normed(), rank.device))
            state = ours.__getstate__()
            ours.close()
            before = ours.module.count.clone()
            ours(placed(batch(0, rank.rank), rank.device))
        assert not {"reducer", "collectives", "_on_device"} & set(state)
        assert int(rank.device.read(ours.module.count) - rank.device.read(before)) == 1

    with job(2, 5, per_node=2) as made:
        made.run(body)
