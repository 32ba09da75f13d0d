"""Gradients are views of buckets, which are rebuilt once; what a step says of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.replicas import (
    RANK,
    SIZE,
    Perceptron,
    Wrap,
    close,
    gradients,
    made,
    mean_of_ranks,
    square_loss,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


def test_gradients_are_views_of_the_buckets(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron))
    places = []
    for step in range(4):
        ours.zero_grad(set_to_none=step % 2 == 0)
        square_loss(ours, step, RANK).backward()
        places.append(
            [param.grad.data_ptr() for param in ours.parameters() if param.grad is not None]
        )
    assert places[1] == places[2] == places[3]
    for bucket in ours.reducer.layout.buckets:
        assert all(bucket.holds(slot) for slot in range(len(bucket.params)))


def test_buckets_are_rebuilt_once_in_the_order_of_readiness(wrap: Wrap) -> None:
    class Backwards(Perceptron):
        def forward(self, inputs: Tensor) -> Tensor:
            for layer in (self.layers[2], self.layers[0], self.layers[1]):
                inputs = torch.tanh(layer(inputs))
            return inputs

    ours = wrap(made(lambda: Backwards((30, 30, 6, 30))))
    model = ours.module
    model.layers[0], model.layers[1], model.layers[2] = (
        nn.Linear(30, 30),
        nn.Linear(30, 4),
        nn.Linear(6, 30),
    )
    orders = []
    for step in range(4):
        square_loss(ours, step, RANK).backward()  # gradients add up, over the rebuilding too
        orders.append([index for plan in ours.reducer.buckets for index in plan.params])
    assert orders[0] == [5, 4, 3, 2, 1, 0]
    assert {index // 2 for index in orders[1][:2]} == {1}
    assert {index // 2 for index in orders[1][-2:]} == {2}
    assert orders[1] == orders[2] == orders[3]
    wanted = [mean_of_ranks(model, square_loss, step) for step in range(4)]
    close(gradients(ours), {n: sum(each[n] for each in wanted) for n in wanted[0]})


def test_statistics(wrap: Wrap) -> None:
    ours = wrap(made(Perceptron), 1)
    square_loss(ours, 0, RANK).backward()
    stats = ours.reducer.stats
    if SIZE == 1:
        assert stats.bytes == stats.internode_bytes == 0
        return
    assert stats.bytes == sum(plan.nbytes for plan in ours.reducer.buckets)
    assert stats.internode_bytes > 0
    assert stats.comm_ms > 0
    assert stats.exposed_comm_ms >= 0
    assert ours.reducer.algorithm == "hierarchical"
    assert "buckets" in ours.reducer.buckets_description()
