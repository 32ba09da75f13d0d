"""Loops that are odd: accumulation, several passes, several models, activation checkpoints."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpcsync.collectives import Collectives
from hpcsync.config import CommConfig
from hpcsync.errors import ModelError
from hpcsync.parallel import DataParallel
from tests.replicas import (
    KIB,
    RANK,
    Mixture,
    Perceptron,
    Wrap,
    close,
    convnet,
    convnet_loss,
    follows_the_mean,
    gradients,
    made,
    mean_of_ranks,
    square_loss,
    vectors,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("to_none", [True, False])
def test_accumulation(wrap: Wrap, to_none: bool) -> None:
    ours = wrap(made(Perceptron), 2)
    for step in range(3):
        ours.zero_grad(set_to_none=to_none)
        for micro in range(3):
            with ours.no_sync() if micro < 2 else contextlib.nullcontext():
                (square_loss(ours, 10 * step + micro, RANK) / 3).backward()
        parts = [mean_of_ranks(ours.module, square_loss, 10 * step + m) for m in range(3)]
        close(gradients(ours), {name: sum(p[name] for p in parts) / 3 for name in parts[0]})


def test_gradients_stay_local_in_no_sync(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    with ours.no_sync():
        assert not ours.reducer.syncing
        square_loss(ours, 0, RANK).backward()
        with ours.no_sync():
            square_loss(ours, 1, RANK).backward()
        assert not ours.reducer.syncing
    assert ours.reducer.syncing
    alone = copy.deepcopy(ours.module)
    alone.zero_grad()
    (square_loss(alone, 0, RANK) + square_loss(alone, 1, RANK)).backward()
    close(gradients(ours), gradients(alone))


def test_accumulation_over_branches_that_differ(wrap: Wrap) -> None:
    """What only an earlier micro-batch used, on any rank, counts; what was thrown away does not."""
    ours = wrap(made(Mixture))

    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        first = model(vectors(0, rank), 1 if rank == 0 else 2).square().sum()
        total: Tensor = first + model(vectors(1, rank), 0).square().sum()
        return total

    for round_ in range(5):
        dropped = round_ % 2 == 1
        ours.zero_grad()
        with ours.no_sync():
            ours(vectors(0, RANK), 1 if RANK == 0 else 2).square().sum().backward()
        if dropped:
            ours.zero_grad()
        ours(vectors(1, RANK), 0).square().sum().backward()
        if dropped:
            wanted = mean_of_ranks(
                ours.module, lambda m, s, r: m(vectors(1, r), 0).square().sum(), 0
            )
        else:
            wanted = mean_of_ranks(ours.module, loss, 0)
        close(gradients(ours), wanted)


def test_gradients_may_add_up_over_exchanges(wrap: Wrap) -> None:
    """Two backward passes without no_sync or zero_grad: the sum of the two means."""
    ours = wrap(made(Perceptron))
    wanted = [mean_of_ranks(ours.module, square_loss, step) for step in range(3)]
    for step in range(3):  # the buckets are rebuilt between the first two
        square_loss(ours, step, RANK).backward()
        total = {name: sum(each[name] for each in wanted[: step + 1]) for name in wanted[0]}
        close(gradients(ours), total)


def test_several_backward_passes_of_one_forward_pass(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    out = ours(vectors(0, RANK))
    out.square().mean().backward(retain_graph=True)
    out.abs().mean().backward()

    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        out = model(vectors(0, rank))
        both: Tensor = out.square().mean() + out.abs().mean()
        return both

    close(gradients(ours), mean_of_ranks(ours.module, loss, 0))


def test_several_forward_passes_of_one_backward_pass(wrap: Wrap) -> None:
    """As in a GAN, batch normalisation included: buffers are set between the two."""

    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        return convnet_loss(model, step, rank) + convnet_loss(model, step + 50, rank)

    ours = wrap(convnet())
    follows_the_mean(ours, loss, 3, 1e-4, 1e-6)


def test_forward_passes_without_a_backward_pass(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    for step in range(3):
        ours.zero_grad()
        ours(vectors(9, RANK))
        ours.eval()
        with torch.no_grad():
            for _ in range(RANK):  # any number, other on each rank
                ours(vectors(9, RANK))
        ours.train()
        square_loss(ours, step, RANK).backward()
        ours(vectors(9, RANK))
        close(gradients(ours), mean_of_ranks(ours.module, square_loss, step))


def test_gradients_asked_for_apart_are_left_alone(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    (grad,) = torch.autograd.grad(square_loss(ours, 0, RANK), [ours.module.layers[0].weight])
    alone = copy.deepcopy(ours.module)
    square_loss(alone, 0, RANK).backward()
    torch.testing.assert_close(grad, alone.layers[0].weight.grad)
    assert all(each is None for each in gradients(ours).values())


def test_two_models_of_one_loss(wrap: Wrap) -> None:
    front = wrap(made(lambda: Perceptron((6, 20, 6))))
    back = DataParallel(
        made(Perceptron),
        runtime=front.collectives.runtime,
        comm=CommConfig(bucket_mb=KIB, first_bucket_mb=KIB),
        collectives=front.collectives,
    )
    both = nn.Sequential(front.module, back.module)
    for step in range(3):
        front.zero_grad()
        back.zero_grad()
        back(front(vectors(step, RANK))).square().mean().backward()
        wanted = mean_of_ranks(both, square_loss, step)
        found = {f"0.{name}": grad for name, grad in gradients(front).items()}
        found |= {f"1.{name}": grad for name, grad in gradients(back).items()}
        close(found, wanted)


class Checkpointed(Perceptron):
    reentrant = False

    def forward(self, inputs: Tensor) -> Tensor:
        middle = torch.tanh(self.layers[0](inputs))
        for layer in (self.layers[1], self.layers[1]):  # the same weights twice
            middle = checkpoint(layer, middle, use_reentrant=self.reentrant)
        out: Tensor = self.layers[2](middle)
        return out


def test_activation_checkpoints(wrap: Wrap) -> None:
    ours = wrap(made(lambda: Checkpointed((6, 30, 30, 4))))
    follows_the_mean(ours, square_loss)


@pytest.mark.parametrize("overlap", [True, False])
def test_reentrant_checkpoints_of_shared_weights_are_refused(wrap: Wrap, overlap: bool) -> None:
    model = made(lambda: Checkpointed((6, 30, 30, 4)))
    model.reentrant = True  # type: ignore[assignment]
    ours = wrap(model, overlap=overlap)
    with pytest.raises(
        ModelError, match=r"layers\.1\.\w+ got a gradient twice.*use_reentrant=False"
    ):
        square_loss(ours, 0, RANK).backward()


def test_collectives_may_be_shared_with_other_work(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    assert isinstance(ours.collectives, Collectives)
    ours.collectives.runtime.barrier()
    square_loss(ours, 0, RANK).backward()
    assert F.mse_loss(ours.norm(), ours.norm()) == 0
