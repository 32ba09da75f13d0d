"""torch on the test double: training is queued as a whole, to the same bits."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.double.device import DoubleDevice, machine
from tests.double.queued import Queued, placed, to_device


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.LayerNorm(30), nn.Linear(30, 5))


def losses(module: nn.Module, device: DoubleDevice | None = None) -> list[Tensor]:
    """Of three steps."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    drawn = torch.Generator().manual_seed(1)
    found = []
    for _ in range(3):
        x = torch.randn(8, 20, generator=drawn)
        y = torch.randint(0, 5, (8,), generator=drawn)
        if device is not None:
            x, y = placed(x, device), placed(y, device)
        loss = F.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize("seed", range(4))
def test_training_is_queued_to_the_same_bits(seed: int) -> None:
    expected = [float(each) for each in losses(model())]
    with machine(seed) as made:
        device = made.device()
        module = to_device(model(), device)
        with Queued(device) as mode:
            found = losses(module, device)
        assert not mode.asked
        assert [float(device.read(each)) for each in found] == expected


def test_what_the_host_asks_for_is_noted() -> None:
    with machine() as made:
        device = made.device()
        with Queued(device) as mode:
            values = placed(torch.ones(4), device)
            total = values.sum()
            assert not mode.asked
            assert total.item() == 4
            assert len(mode.asked) == 1
            out = torch.zeros(4)
            out.copy_(values + 1)
            assert len(mode.asked) == 2
            assert out.tolist() == [2] * 4


def test_results_are_poison_until_they_are_made() -> None:
    with machine() as made:
        device = made.device()
        values = placed(torch.ones(4), device)
        made.synchronize()
        gate = threading.Event()
        device.current().apply(lambda: gate.wait(30))
        with Queued(device):
            double = values * 2
            values.mul_(3)
        assert double.isnan().all()
        assert (values == 1).all()
        gate.set()
        assert device.read(double).tolist() == [2] * 4
        assert device.read(values).tolist() == [3] * 4
