"""A step on a real GPU: torch is told to refuse whatever makes the host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpcsync.config import TrainConfig
from hpcsync.device import Device
from hpcsync.engine import Engine, StepResult
from hpcsync.optimizers import make_optimizer
from hpcsync.parallel.placement import get
from hpcsync.trace.events import NAMES
from tests.alone import Alone, Net

pytestmark = pytest.mark.gpu

STEPS, SKIPPED = 8, 5


@pytest.fixture(scope="module")
def device() -> Device:
    return get("cuda")


def engine(device: Device | None, lag: int | None = None, **settings: Any) -> Engine:
    config = TrainConfig(
        **{"steps": STEPS, "lr": 0.01, "warmup": 2, "clip_norm": 0.1, "loss_scale": 128.0}
        | settings
    )
    model = Net(64, 256)
    if device is not None:
        model.to(torch.device(device.name, device.index))
    optimizer = make_optimizer(model, config)
    return Engine(model, optimizer, Alone(model), config, streams=device, lag=lag)


def batches() -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    found = [
        (torch.randn(32, 64, generator=drawn), torch.randn(32, 1, generator=drawn))
        for _ in range(STEPS)
    ]
    found[SKIPPED - 1][0][0, 0] = torch.inf
    return found


def run(made: Engine, *, strict: bool = False) -> list[StepResult]:
    found: list[StepResult | None] = []
    for step, each in enumerate(batches()):
        made.recorder.begin_step(step + 1)
        # The first steps make what is kept: the optimizer's state, pinned memory, cuBLAS's own.
        torch.cuda.set_sync_debug_mode("error" if strict and step >= 2 else "default")
        try:
            found.append(made.step([each]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.append(made.flush())
    return [each for each in found if each is not None]


def test_no_operation_of_a_step_waits(device: Device) -> None:
    made = engine(device)
    assert made.lag == 1
    found = run(made, strict=True)
    assert [each.step for each in found] == list(range(1, STEPS + 1))
    assert [each.step for each in found if each.skipped] == [SKIPPED]


def test_reading_late_changes_no_bit(device: Device) -> None:
    late, plain = engine(device), engine(device, lag=0)
    one, two = run(late), run(plain)
    assert [each.loss for each in one] == [each.loss for each in two]
    for first, second in zip(late.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_steps_are_the_hosts_within_rounding(device: Device) -> None:
    gpu, host = run(engine(device)), run(engine(None))
    for one, two in zip(gpu, host, strict=True):
        assert one.skipped == two.skipped
        if not one.skipped:
            assert one.loss == pytest.approx(two.loss, rel=1e-3)
            assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-2)


def test_spans_have_the_gpus_times(device: Device) -> None:
    made = engine(device)
    run(made)
    spans = made.recorder.last()
    for name in ("forward", "backward", "optimizer", "step"):
        mine = spans[[NAMES[each][0] == name for each in spans["name"]]]
        assert sorted(mine["step"].tolist()) == list(range(1, STEPS + 1))
        assert (mine["end"] > mine["start"]).all()
