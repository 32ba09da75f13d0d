"""Parameters that are odd: left out, tied, frozen, joining later, and of every shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hpcsync.config import CompressConfig
from tests.replicas import (
    LAST,
    RANK,
    SIZE,
    Mixture,
    Perceptron,
    Wrap,
    close,
    follows_the_mean,
    gpt,
    gpt_loss,
    gradients,
    made,
    mean_of_ranks,
    mixture_loss,
    same_on_all_ranks,
    square_loss,
    vectors,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("to_none", [True, False])
def test_parameters_that_some_or_all_ranks_leave_out(wrap: Wrap, to_none: bool) -> None:
    ours = wrap(made(Mixture))
    seen: set[str] = set()
    for step in range(4):
        ours.zero_grad(set_to_none=to_none)
        mixture_loss(ours, step, RANK).backward()
        found, wanted = gradients(ours), mean_of_ranks(ours.module, mixture_loss, step)
        if not to_none:  # what once had a gradient has zeros, as on one rank
            seen |= {name for name, grad in wanted.items() if grad is not None}
            for name in seen:
                if wanted[name] is None:
                    wanted[name] = torch.zeros_like(dict(ours.module.named_parameters())[name])
        close(found, wanted)
        assert found["never.weight"] is None
        assert found["branches.3.weight"] is None


def test_a_rank_that_uses_nothing_but_one_parameter(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    for step in range(3):
        ours.zero_grad()
        loss = square_loss(ours, step, RANK)
        if RANK == LAST:
            loss = ours.module.layers[0].bias.sum()
        loss.backward()
        same_on_all_ranks(gradients(ours))
        assert all(grad is not None for grad in gradients(ours).values()) == (SIZE > 1)


def test_tied_parameters(wrap: Wrap) -> None:
    model = gpt()
    assert model.head.weight is model.embedding.weight
    ours = wrap(model)
    gpt_loss(ours, 0, RANK).backward()
    close(gradients(ours), mean_of_ranks(ours.module, gpt_loss, 0))
    assert sum(len(plan.params) for plan in ours.reducer.buckets) == len(list(model.parameters()))


def test_parameters_may_be_unfrozen_later(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    first, last = ours.module.layers[0], ours.module.layers[-1]
    for stage in range(4):
        first.requires_grad_(stage in (1, 3))
        last.requires_grad_(stage in (0, 1, 2))
        for step in range(3):
            ours.zero_grad()
            square_loss(ours, step, RANK).backward()
            close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))
            assert (first.weight.grad is None) == (stage not in (1, 3))


def test_a_parameter_may_take_the_place_of_one_of_the_same_shape(wrap: Wrap) -> None:
    ours = wrap(made(lambda: Perceptron((6, 6, 6, 6))), bucket_mb=25.0, first_bucket_mb=25.0)
    for stage in range(4):
        if stage in (1, 3):  # the next layer joins as this one leaves
            for index, layer in enumerate(ours.module.layers):
                layer.requires_grad_(index == stage % 3)
        if stage == 2:
            torch.manual_seed(stage)
            ours.module.layers[1] = nn.Linear(6, 6)
        for step in range(2):
            ours.zero_grad()
            square_loss(ours, step, RANK).backward()
            close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))
            same_on_all_ranks(gradients(ours))


def test_modules_may_be_added_later(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    for stage in range(2):
        follows_the_mean(ours, square_loss)
        torch.manual_seed(stage)
        ours.module.layers.append(nn.Linear(4, 4))
    assert len(gradients(ours)) == 10


def test_a_joining_parameter_keeps_gradients_that_are_there(wrap: Wrap) -> None:
    """Joining in the middle of an accumulation loses nothing."""
    ours = wrap(made(Perceptron))
    ours.module.layers[0].requires_grad_(False)
    with ours.no_sync():
        square_loss(ours, 0, RANK).backward()
    ours.module.layers[0].requires_grad_(True)
    square_loss(ours, 1, RANK).backward()
    first = mean_of_ranks(ours.module, square_loss, 0)
    wanted = mean_of_ranks(ours.module, square_loss, 1)
    for name, grad in wanted.items():
        if not name.startswith("layers.0"):
            assert grad is not None
            grad += first[name]
    close(gradients(ours), wanted)


def test_frozen_parameters_have_no_part(wrap: Wrap) -> None:
    model = made(Perceptron)
    model.layers[1].requires_grad_(False)
    ours = wrap(model)
    square_loss(ours, 0, RANK).backward()
    found = gradients(ours)
    assert found["layers.1.weight"] is None
    close(found, mean_of_ranks(ours.module, square_loss, 0))


def test_a_model_without_trainable_parameters(wrap: Wrap) -> None:
    model = made(Perceptron).requires_grad_(False)
    ours = wrap(model)
    assert not ours(vectors(0, RANK)).requires_grad
    assert ours.reducer.buckets_description() == "none (no parameter wants a gradient)"
    assert float(ours.norm()) == 0
    assert ours.finite()


class Odd(nn.Module):
    """A scalar, an empty one, one of five axes, and one that is not dense in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.deep = nn.Parameter(torch.randn(2, 1, 3, 1, 2))
        self.columns = nn.Parameter(torch.randn(6, 8)[:, ::2])
        self.across = nn.Parameter(torch.randn(5, 7).t())

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.scalar * (inputs @ self.columns).sum() + self.deep.square().sum()
        return out * self.across.mean() + self.empty.sum()


def test_shapes_and_strides_of_all_kinds(wrap: Wrap) -> None:
    ours = wrap(made(Odd))
    for step in range(3):
        ours.zero_grad(set_to_none=step != 2)
        square_loss(ours, step, RANK).backward()
        close(gradients(ours), mean_of_ranks(ours.module, square_loss, step), 1e-4, 1e-5)


def test_sparse_gradients_become_dense(wrap: Wrap) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 5, sparse=True)

        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
            out: Tensor = self.table(inputs).square().mean()
            return out

    ours = wrap(made(Sparse))
    for step in range(2):
        ours.zero_grad()
        gpt_loss(ours, step, RANK).backward()
        wanted = mean_of_ranks(ours.module, gpt_loss, step)
        close(gradients(ours), {n: g.to_dense() for n, g in wanted.items() if g is not None})


@pytest.mark.parametrize("joins", [True, False])
def test_what_auto_weighs_are_the_parameters_of_the_step(wrap: Wrap, joins: bool) -> None:
    """They change while it still measures."""
    model = made(lambda: Perceptron((6, 64, 64, 64, 4)))
    model.layers[1].requires_grad_(not joins)
    compress = CompressConfig(codec="auto", where="all", warmup=4)
    ours = wrap(model, compress=compress, bucket_mb=25.0)
    for step in range(30):
        if step == 2:
            model.layers[1].requires_grad_(joins)
        ours.zero_grad()
        square_loss(ours, step, RANK).backward()
        same_on_all_ranks(gradients(ours))
    assert (model.layers[1].weight.grad is not None) == joins
