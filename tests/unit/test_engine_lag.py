"""A step whose result is read late, as on a device, makes the same bits as one that waits."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcsync.config import TrainConfig
from hpcsync.engine import Engine, StepResult, multiply, skips_by_itself
from hpcsync.errors import NonFiniteError
from hpcsync.optimizers import make_optimizer
from hpcsync.rules import LossScale
from tests.alone import Alone, Net

STEPS = 12


def engine(lag: int, **settings: Any) -> Engine:
    model = Net()
    config = TrainConfig(**{"steps": STEPS, "lr": 0.1, "warmup": 2, **settings})
    return Engine(model, make_optimizer(model, config), Alone(model), config, lag=lag)


def batches(bad: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    found = [(torch.randn(8, 6), torch.randn(8, 1)) for _ in range(STEPS)]
    for step in bad:
        found[step - 1][0][0, 0] = math.nan
    return found


def run(made: Engine, data: list[tuple[Tensor, Tensor]]) -> list[StepResult]:
    found = [made.step([each]) for each in data]
    return [each for each in [*found, made.flush()] if each is not None]


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


def told(results: list[StepResult]) -> list[str]:
    return [repr(each) for each in results]  # NaN is not equal to itself


@pytest.mark.parametrize("bad", [(), (1,), (4,), (1, 2, 7, 12)], ids=str)
@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
@pytest.mark.parametrize("scale", ["none", 1024.0, 3.0])
def test_the_same_bits(bad: tuple[int, ...], clip: float, scale: Any) -> None:
    plain, late = (engine(lag, clip_norm=clip, loss_scale=scale) for lag in (0, 1))
    one, two = run(plain, batches(bad)), run(late, batches(bad))
    assert [each.step for each in two] == list(range(1, STEPS + 1))
    assert told(one) == told(two)
    assert [each.step for each in two if each.skipped] == list(bad)
    assert equal(plain.state_dict(), late.state_dict())


def test_results_come_one_step_late() -> None:
    made = engine(1)
    data = batches()
    assert made.step([data[0]]) is None
    first = made.step([data[1]])
    assert first is not None
    assert first.step == 1
    assert (made.step_count, made.counted) == (2, 1)
    last = made.flush()
    assert last is not None
    assert last.step == 2
    assert made.flush() is None
    assert made.step([data[2]]) is None


def test_a_state_is_whole_and_loses_no_result() -> None:
    made = engine(1)
    data = batches((2,))
    made.step([data[0]])
    made.step([data[1]])
    assert made.state_dict()["skipped"] == 1
    second = made.step([data[2]])
    assert second is not None
    assert (second.step, second.skipped) == (2, True)


def test_a_scale_follows_one_step_later_and_only_once() -> None:
    """Two steps of one overflow halve the scale once."""
    made = engine(1, loss_scale="dynamic", max_skipped=20)
    results = run(made, batches((3, 4)))
    assert [each.loss_scale / 65536 for each in results[:6]] == [1, 1, 1, 1, 0.5, 0.5]
    assert made.data_parallel.factors == [0.5]  # type: ignore[attr-defined]


def test_reading_early_changes_no_number() -> None:
    """Checkpoints and evaluations wait for the device; when they come must not matter."""
    data = batches((3, 5))
    plain, looked = (engine(1, loss_scale="dynamic") for _ in range(2))
    one = run(plain, data)
    two: list[StepResult | None] = []
    for step, each in enumerate(data, start=1):
        two.append(looked.step([each]))
        if step in (3, 4, 8):
            looked.state_dict()
        if step in (5, 9):
            two.append(looked.flush())
    assert told([each for each in [*two, looked.flush()] if each]) == told(one)


@pytest.mark.parametrize("stop", range(2, 7))
def test_a_run_goes_on_from_a_state_to_the_same_bits(stop: int) -> None:
    data = batches((3, 5))
    whole = engine(1, loss_scale="dynamic")
    expected = run(whole, data)
    first, second = (engine(1, loss_scale="dynamic") for _ in range(2))
    run(first, data[:stop])
    second.load_state_dict(first.state_dict())
    assert told(run(second, data[stop:])) == told(expected[stop:])
    assert equal(second.state_dict(), whole.state_dict())


def test_steps_in_a_row_are_named_by_the_last_that_was_read() -> None:
    made = engine(1, max_skipped=1)
    data = batches((1, 2, 3))
    for each in data[:3]:
        made.step([each])
    with pytest.raises(NonFiniteError, match=r"step 2: .* in 2 steps in a row"):
        made.check_skipped()


def huge() -> list[tuple[Tensor, Tensor]]:
    """Whose loss times the first scales is too large for a float32."""
    return [(x, y + 1e15) for x, y in batches()]


def test_two_steps_of_one_overflow_count_once_in_a_row() -> None:
    plain, late = (engine(lag, loss_scale="dynamic", steps=40) for lag in (0, 1))
    data = huge()[:8] * 2
    count = [each.skipped for each in run(plain, data[:8])].index(False)
    assert (count, plain.skipped) == (4, 4)
    most = 0
    for each in data:
        late.step([each])
        most = max(most, late.skipped_in_row)
    late.flush()
    assert (most, late.skipped_in_row) == (count, 0)
    assert late.skipped >= 2 * count, "each is a step that changed nothing"


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_resumed_run_counts_steps_in_a_row_as_before(stop: int) -> None:
    whole, first, second = (engine(1, loss_scale="dynamic") for _ in range(3))
    run(whole, huge()[:6])
    run(first, huge()[:stop])
    second.load_state_dict(first.state_dict())
    run(second, huge()[stop:6])
    assert second.skipped_in_row == whole.skipped_in_row == 3


def test_a_scale_that_falls_no_more_counts_every_step() -> None:
    made = engine(1, loss_scale="dynamic")
    made.scale.value = 2.0**-14
    run(made, batches((1, 2, 3, 4, 5))[:5])
    assert made.skipped_in_row == 5


def test_what_cannot_skip_by_itself_waits() -> None:
    model = Net()
    assert skips_by_itself(make_optimizer(model, TrainConfig()))
    assert not skips_by_itself(make_optimizer(model, TrainConfig(optimizer="onebit_adam")))
    assert not skips_by_itself(torch.optim.AdamW(model.parameters(), fused=False))


@pytest.mark.parametrize("factor", [1 / 3, 1.0, 0.1, 1e-3])
def test_a_factor_on_the_device_is_a_number(factor: float) -> None:
    for dtype in (torch.float32, torch.float64):
        values = torch.randn(1000, dtype=dtype)
        one, two = [values.clone()], [values.clone()]
        torch._foreach_mul_(one, factor)
        multiply(two, torch.tensor(factor, dtype=torch.float64))
        assert torch.equal(one[0], two[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    values = torch.randn(1000).to(dtype)
    found = values.clone()
    multiply([found], torch.tensor(1 / 3, dtype=torch.float64))
    assert torch.equal(found, (values.float() * torch.tensor(1 / 3)).to(dtype))


def test_a_scale_that_was_taken_back_is_no_news() -> None:
    scale = LossScale("dynamic")
    scale.update(False, 65536.0)
    scale.update(False, 65536.0)
    assert scale.value == 32768.0
    scale.update(False, 32768.0)
    assert scale.value == 16384.0


def test_parts_of_a_step_are_marked_for_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    made, found = engine(0), []

    def marked(text: str) -> contextlib.AbstractContextManager[None]:
        found.append(text)
        return contextlib.nullcontext()

    monkeypatch.setattr(made.streams, "range", marked)
    made.step(batches()[:2])
    assert found == ["forward", "backward", "forward", "backward", "optimizer"]
