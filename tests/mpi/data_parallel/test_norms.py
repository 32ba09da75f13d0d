"""The norm of the gradients, and clipping by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.replicas import (
    KIB,
    RANK,
    SIZE,
    WORLD,
    Perceptron,
    Wrap,
    close,
    gpt,
    gpt_loss,
    gradients,
    made,
    square_loss,
    tokens,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm(wrap: Wrap, dtype: torch.dtype) -> None:
    ours = wrap(made(Perceptron).to(dtype))
    square_loss(ours, 0, RANK).backward()
    grads = [param.grad.double() for param in ours.parameters() if param.grad is not None]
    truth = torch.cat([grad.flatten() for grad in grads]).norm()
    assert ours.norm().dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(ours.norm().double(), truth, rtol=1e-5, atol=0)
    assert WORLD.allgather(float(ours.norm())) == [float(ours.norm())] * SIZE


def test_norm_of_float16_does_not_overflow(wrap: Wrap) -> None:
    model = nn.Linear(50, 50).half()
    ours = wrap(model)
    (model.weight.float().sum() * 30000 + model.bias.float().sum()).backward()
    assert ours.finite()
    torch.testing.assert_close(float(ours.norm()), 30000 * 50.0, rtol=1e-3, atol=0)


def test_clipping(wrap: Wrap) -> None:
    ours, alone = wrap(gpt()), gpt()
    gpt_loss(ours, 0, RANK).backward()
    batches = [tokens(0, rank) for rank in range(SIZE)]
    alone(*(torch.cat(parts) for parts in zip(*batches, strict=True))).backward()
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    torch.testing.assert_close(ours.norm(), norm, rtol=1e-4, atol=0)
    nn.utils.clip_grads_with_norm_(ours.parameters(), 0.1, ours.norm())
    close(gradients(ours), gradients(alone), rtol=1e-3, atol=1e-6)


def test_norm_does_not_depend_on_buckets(wrap: Wrap) -> None:
    norms = []
    for bucket in (KIB, 25.0):
        ours = wrap(gpt(), reproducible=True, bucket_mb=bucket, first_bucket_mb=bucket)
        for step in range(2):
            ours.zero_grad()
            gpt_loss(ours, step, RANK).backward()
            norms.append(float(ours.norm()))
    assert norms[:2] == norms[2:]
