"""Models that cannot be wrapped are told, on all ranks, by the parameter's name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hpcsync.errors import ModelError
from hpcsync.launch import AgreedError
from tests.replicas import LAST, RANK, SIZE, WORLD, Perceptron, Wrap, made

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


def _wider() -> nn.Module:
    return Perceptron((6, 40, 31, 4) if RANK == LAST else (6, 40, 30, 4))


def _longer() -> nn.Module:
    return Perceptron((6, 40, 30, 4, 4) if RANK == LAST else (6, 40, 30, 4))


def _lower() -> nn.Module:
    model = Perceptron()
    return model.bfloat16() if RANK == LAST else model


def _frozen() -> nn.Module:
    model = Perceptron()
    model.layers[1].requires_grad_(RANK != LAST)
    return model


def _other_frozen() -> nn.Module:
    model = Perceptron()
    model.add_module("frozen", nn.Linear(3, 3 + (RANK == LAST)).requires_grad_(False))
    return model


def _other_buffers() -> nn.Module:
    model = Perceptron()
    model.register_buffer("seen", torch.zeros(2 + (RANK == LAST)))
    return model


@pytest.mark.parametrize("build", [_wider, _longer, _lower, _frozen, _other_frozen, _other_buffers])
def test_models_that_differ_are_told_on_all_ranks(
    wrap: Wrap, build: Callable[[], nn.Module]
) -> None:
    if SIZE == 1:
        pytest.skip("a rank alone agrees with itself")
    with pytest.raises(ModelError) as told:
        wrap(made(build))
    text = str(told.value)
    assert isinstance(told.value, AgreedError)
    assert text.startswith(f"rank {LAST}: the models differ between ranks: ")
    assert "build the same model on every rank" in text
    assert "\n" not in text
    assert WORLD.allgather(text) == [text] * SIZE


def test_parameters_that_cannot_be_added_are_named(wrap: Wrap) -> None:
    model = Perceptron()
    model.register_parameter("wave", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(ModelError, match=r"parameter wave: dtype complex64 cannot be reduced; use"):
        wrap(model)


def test_parameters_elsewhere_are_named(wrap: Wrap) -> None:
    with pytest.raises(ModelError, match=r"parameter layers\.0\.weight is on meta.*model\.cpu\(\)"):
        wrap(Perceptron().to("meta"))


def test_parameters_without_a_shape_are_named(wrap: Wrap) -> None:
    with pytest.raises(ModelError, match=r"weight has no shape yet; pass a batch"):
        wrap(nn.LazyLinear(3))
