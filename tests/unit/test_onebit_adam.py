"""1-bit Adam's optimizer: AdamW first, then momentum over a frozen variance."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW

from hpcsync.onebit_adam import OneBitAdam

SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def weights(seed: int = 0) -> list[nn.Parameter]:
    made = torch.Generator().manual_seed(seed)
    shapes = [(30, 20), (7,), (4, 3, 5)]
    return [nn.Parameter(torch.randn(shape, generator=made)) for shape in shapes]


def gradient(param: Tensor, index: int, step: int, rank: int = 0) -> Tensor:
    """Some gradient, which does not depend on the weights' values."""
    made = torch.Generator().manual_seed(1000 * step + 10 * index + rank)
    return torch.randn(param.shape, generator=made) * (index + 1) * 0.01


def train(params: list[nn.Parameter], optimizer: OneBitAdam, steps: range, ranks: int = 1) -> None:
    """Steps on the mean over ``ranks`` of what each would exchange."""
    for step in steps:
        for index, param in enumerate(params):
            sent = [gradient(param, index, step, rank) for rank in range(ranks)]
            if optimizer.momentum.active:
                for each in sent:
                    optimizer.momentum.apply(param, each, each)
            param.grad = torch.stack(sent).mean(dim=0)
        optimizer.step()


@pytest.mark.parametrize("fused", [True, None])
def test_first_phase_is_adamw_bit_for_bit(fused: bool | None) -> None:
    params, others = weights(), weights()
    optimizer = OneBitAdam(params, **SETTINGS, freeze=100, fused=fused)
    adamw = AdamW(others, **SETTINGS, fused=fused)
    train(params, optimizer, range(20))
    for step in range(20):
        for index, param in enumerate(others):
            param.grad = gradient(param, index, step)
        adamw.step()
    assert not optimizer.momentum.active
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[param][name], adamw.state[other][name])


def plain(
    weight: NDArray[np.float64], given: list[NDArray[np.float64]], freeze: int, floor: float
) -> NDArray[np.float64]:
    """Both phases in float64, with the mean gradient of each step."""
    (beta1, beta2), lr, eps = SETTINGS["betas"], SETTINGS["lr"], SETTINGS["eps"]
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step, g in enumerate(given, start=1):
        m = beta1 * m + (1 - beta1) * g
        counted = v
        if step <= freeze:
            counted = v = beta2 * v + (1 - beta2) * g * g
        else:
            counted = np.maximum(v, floor**2 * v.mean())
        root = np.sqrt(counted / (1 - beta2 ** min(step, freeze))) + eps
        weight = weight * (1 - lr * SETTINGS["weight_decay"])
        weight = weight - lr * m / (1 - beta1**step) / root
    return weight


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_second_phase_is_adam_with_a_frozen_variance(ranks: int, floor: float) -> None:
    params, freeze, steps = weights(), 8, 30
    starts = [param.detach().double().numpy().copy() for param in params]
    optimizer = OneBitAdam(params, **SETTINGS, freeze=freeze, floor=floor)
    train(params, optimizer, range(steps), ranks)
    assert optimizer.momentum.active
    for index, (param, start) in enumerate(zip(params, starts, strict=True)):
        given = [
            np.mean(
                [gradient(param, index, step, rank).double().numpy() for rank in range(ranks)],
                axis=0,
            )
            for step in range(steps)
        ]
        expected = plain(start, given, freeze, floor)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=2e-5, atol=2e-6)


def test_momentum_is_that_of_adamw_bit_for_bit() -> None:
    params, others = weights(), weights()
    optimizer = OneBitAdam(params, **SETTINGS, freeze=3)
    adamw = AdamW(others, **SETTINGS, foreach=False)
    train(params, optimizer, range(9))
    for step in range(9):
        for index, param in enumerate(others):
            param.grad = gradient(param, index, step)
        adamw.step()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(optimizer.state[param]["exp_avg"], adamw.state[other]["exp_avg"])


def test_what_is_kept_is_what_was_exchanged() -> None:
    params = weights()
    optimizer = OneBitAdam(params, **SETTINGS, freeze=2)
    train(params, optimizer, range(2))
    for param in params:
        param.grad = torch.sign(param.detach())
    optimizer.step()
    for param in params:
        assert param.grad is not None
        assert torch.equal(optimizer.state[param]["exp_avg"], param.grad)
        assert param.grad.data_ptr() != optimizer.state[param]["exp_avg"].data_ptr()


def test_the_variance_is_frozen_in_its_place() -> None:
    params = weights()
    optimizer = OneBitAdam(params, **SETTINGS, freeze=4)
    train(params, optimizer, range(3))
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert not optimizer.momentum.active
    train(params, optimizer, range(3, 4))
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "denominator"}
    assert optimizer.momentum.active
    before = [optimizer.state[param]["denominator"].clone() for param in params]
    train(params, optimizer, range(4, 8))
    for param, old in zip(params, before, strict=True):
        assert torch.equal(optimizer.state[param]["denominator"], old)
        assert float(optimizer.state[param]["step"]) == 8


@pytest.mark.parametrize("stop", [3, 6, 11])
@pytest.mark.parametrize("fused", [True, None])
def test_resumes_to_the_same_bits(stop: int, fused: bool | None) -> None:
    params = weights()
    optimizer = OneBitAdam(params, **SETTINGS, freeze=6, fused=fused)
    train(params, optimizer, range(stop))
    file = io.BytesIO()
    torch.save({"state": optimizer.state_dict(), "weights": params}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    resumed = [nn.Parameter(each.detach().clone()) for each in saved["weights"]]
    strange = {**SETTINGS, "lr": 9.0, "betas": (0.5, 0.5)}
    other = OneBitAdam(resumed, **strange, freeze=1, fused=fused)
    assert other.beta1(resumed[0]) == 0.5
    other.load_state_dict(copy.deepcopy(saved["state"]))
    assert other.momentum.active == optimizer.momentum.active
    train(params, optimizer, range(stop, 15))
    train(resumed, other, range(stop, 15))
    for left, right in zip(params, resumed, strict=True):
        assert torch.equal(left, right)
        for name, value in optimizer.state[left].items():
            assert torch.equal(value, other.state[right][name])


def test_a_parameter_that_joins_late_learns_its_own_variance() -> None:
    params = weights()
    optimizer = OneBitAdam(params, **SETTINGS, freeze=3)
    train(params[:2], optimizer, range(5))
    assert optimizer.momentum.active
    late = params[2]
    out = torch.empty_like(late)
    given = gradient(late, 2, 5)
    optimizer.momentum.apply(late, given, out)
    assert torch.equal(out, given)
    train(params, optimizer, range(5, 7))
    assert "exp_avg_sq" in optimizer.state[late]
    train(params, optimizer, range(7, 8))
    assert "denominator" in optimizer.state[late]


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    params = weights()
    optimizer = OneBitAdam(params, **SETTINGS, freeze=2)
    train(params, optimizer, range(3))
    before = params[0].detach().clone()
    params[0].grad = None
    momentum = optimizer.state[params[0]]["exp_avg"].clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], momentum)


def test_momentum_of_a_rank_without_a_gradient() -> None:
    params = weights()
    optimizer = OneBitAdam(params, **SETTINGS, freeze=2)
    train(params, optimizer, range(3))
    view = torch.zeros_like(params[0])
    optimizer.momentum.apply(params[0], view, view)
    torch.testing.assert_close(view, 0.9 * optimizer.state[params[0]]["exp_avg"])


@pytest.mark.parametrize("in_place", [True, False])
def test_the_loss_scale_is_taken_out(in_place: bool) -> None:
    params = weights()
    optimizer = OneBitAdam(params, **SETTINGS, freeze=2)
    train(params, optimizer, range(3))
    given = gradient(params[0], 0, 3)
    expected = torch.empty_like(given)
    optimizer.momentum.apply(params[0], given, expected)
    optimizer.momentum.scale = 1024.0
    scaled = given * 1024
    out = scaled if in_place else torch.empty_like(given)
    optimizer.momentum.apply(params[0], scaled, out)
    assert torch.equal(out, expected)
    if not in_place:
        assert torch.equal(scaled, given * 1024)


def test_elements_that_had_no_gradient_do_not_run_away() -> None:
    table, never = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(3, 3))
    optimizer = OneBitAdam([table, never], lr=0.01, weight_decay=0.0, freeze=5)
    for _ in range(5):
        table.grad, never.grad = torch.ones_like(table), torch.zeros_like(never)
        table.grad[6:] = 0
        optimizer.step()
    for _ in range(5):
        # What a codec's noise puts in their place.
        table.grad, never.grad = torch.full_like(table, 0.1), torch.full_like(never, 0.1)
        optimizer.step()
    moved = (table.detach() - 1).abs()
    assert 0 < float(moved[6:].max()) < 1
    assert torch.equal(never, torch.ones(3, 3))


def test_closure_and_groups() -> None:
    param, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = OneBitAdam([{"params": [param], "betas": (0.5, 0.9)}], freeze=1)
    assert optimizer.beta1(param) == 0.5
    optimizer.add_param_group({"params": [other]})

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = (param * other).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach()

    assert float(optimizer.step(loss)) == 4
    ones = torch.ones(4)
    out = torch.empty(4)
    optimizer.momentum.apply(param, ones * 3, out)
    torch.testing.assert_close(out, 0.5 * ones * 0.5 + 0.5 * ones * 3)
    optimizer.momentum.apply(other, ones * 3, out)
    torch.testing.assert_close(out, 0.9 * ones * 0.1 + 0.1 * ones * 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", -1.0), ("eps", -1.0), ("weight_decay", -0.1), ("floor", -1.0), ("freeze", 0)),
        *(("betas", (1.0, 0.9)), ("betas", (0.9, -0.1))),
    ],
)
def test_arguments_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}.* must "):
        OneBitAdam(weights(), **{"freeze": 3, **SETTINGS, name: value})
