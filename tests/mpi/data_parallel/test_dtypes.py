"""Parameters of other types and memory formats, autocast, loss scales, and numbers that are bad."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.replicas import (
    LAST,
    RANK,
    Perceptron,
    Wrap,
    close,
    convnet,
    follows_the_mean,
    gpt,
    gpt_loss,
    gradients,
    made,
    mean_of_ranks,
    pictures,
    same_on_all_ranks,
    square_loss,
    weights,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(wrap: Wrap, dtype: torch.dtype) -> None:
    ours = wrap(made(Perceptron).to(dtype), 2)
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-12
    for step in range(3):
        ours.zero_grad()
        square_loss(ours, step, RANK).backward()
        found = gradients(ours)
        assert {grad.dtype for grad in found.values() if grad is not None} == {dtype}
        close(found, mean_of_ranks(ours.module, square_loss, step), tolerance, tolerance * 0.1)
        same_on_all_ranks(found)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(6, 20).bfloat16()
        self.high = nn.Linear(20, 20)
        self.higher = nn.Linear(20, 4).double()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.higher(self.high(self.low(inputs.bfloat16()).float()).double())
        return out


def test_mixed_dtypes(wrap: Wrap) -> None:
    ours = wrap(made(Mixed))
    follows_the_mean(ours, square_loss, 3, 3e-2, 3e-3)
    assert {plan.dtype for plan in ours.reducer.buckets} == {"bfloat16", "float32", "float64"}
    assert ours.finite()


def test_a_model_that_changes_its_dtype(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    square_loss(ours, 0, RANK).backward()
    ours.zero_grad()
    ours.double()
    square_loss(ours, 1, RANK).backward()
    close(gradients(ours), mean_of_ranks(ours.module, square_loss, 1))


def test_channels_last(wrap: Wrap) -> None:
    model = convnet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours = wrap(model)

    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        images, targets = pictures(step, rank)
        out: Tensor = model(images.to(memory_format=torch.channels_last), targets)
        return out

    for step in range(3):
        ours.zero_grad()
        loss(ours, step, RANK).backward()
        close(gradients(ours), mean_of_ranks(ours.module, loss, step), 1e-4, 1e-6)
        for param in ours.parameters():
            assert param.grad is not None
            assert param.grad.stride() == param.stride()


def test_autocast(wrap: Wrap) -> None:
    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gpt_loss(model, step, rank)

    ours = wrap(gpt())
    follows_the_mean(ours, loss, 2, 1e-4, 1e-5)


def test_a_loss_scale_finds_inf_on_every_rank(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    for step in range(3):
        ours.zero_grad()
        scale = 2.0**10
        loss = square_loss(ours, step, RANK) * scale
        if step == 1 and RANK == LAST:
            loss = loss * float("inf")
        loss.backward()
        assert ours.finite() == (step != 1)
        if step != 1:
            for param in ours.parameters():
                assert param.grad is not None
                param.grad /= scale
            close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_one_bad_number_reaches_every_rank_and_goes_again(wrap: Wrap, bad: str) -> None:
    ours = wrap(made(Perceptron), 3)
    for step in range(2):
        ours.zero_grad()
        loss = square_loss(ours, step, RANK)
        if step == 0 and RANK == LAST:
            loss = loss + ours.module.layers[1].bias[3] * float(bad)
        loss.backward()
        assert ours.finite() == (step == 1)
        grad = ours.module.layers[1].bias.grad
        assert bool(torch.isfinite(grad[3])) == (step == 1)
        assert bool(torch.isfinite(grad[4:]).all())


def test_torchs_own_scaler(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    for step in range(3):
        before = weights(ours)
        optimizer.zero_grad()
        loss = square_loss(ours, step, RANK)
        if step == 1 and RANK == 0:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        changed = any(not torch.equal(before[name], value) for name, value in weights(ours).items())
        assert changed == (step != 1)
    assert scaler.get_scale() == 2.0**9
    same_on_all_ranks(weights(ours))  # type: ignore[arg-type]
