"""The gradients that torch's own DDP gives, those that one process with the whole batch gives, and
the same bits whatever the timing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.replicas import (
    CASES,
    KIB,
    RANK,
    SIZE,
    WORLD,
    Perceptron,
    Wrap,
    close,
    follows_the_mean,
    gpt,
    gpt_loss,
    gradients,
    made,
    same_bits,
    same_on_all_ranks,
    square_loss,
    tokens,
    vectors,
    weights,
)

pytestmark = [pytest.mark.mpi, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def gloo() -> Iterator[None]:
    """torch.distributed over Gloo between the same processes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = (
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if not RANK else None
    )
    port = WORLD.bcast(store.port if store is not None else 0)
    if store is None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=SIZE)
    yield
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("case", ["gpt", "convnet", "mixture"])
def test_gradients_are_those_of_ddp(wrap: Wrap, gloo: None, case: str, width: int) -> None:
    build, loss = CASES[case]
    ours = wrap(build(), width)
    theirs = nn.parallel.DistributedDataParallel(
        build(), bucket_cap_mb=0.001, find_unused_parameters=case == "mixture"
    )
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (ours, theirs)]
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            if case == "mixture":  # DDP sees one forward pass a step
                _mixture_once(model, step)
            else:
                loss(model, step, RANK).backward()
        close(gradients(ours), gradients(theirs))
        same_on_all_ranks(gradients(ours))
        for optimizer in optimizers:
            optimizer.step()
    close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-6)


def _mixture_once(model: nn.Module, step: int) -> None:
    branch = 1 if RANK % 2 else 2 if step % 2 else 0
    model(vectors(step, RANK), branch).square().mean().backward()


def test_one_process_with_the_whole_batch_gives_the_same(wrap: Wrap) -> None:
    ours, alone = wrap(gpt(), 2), gpt()
    for step in range(3):
        ours.zero_grad()
        alone.zero_grad()
        gpt_loss(ours, step, RANK).backward()
        batches = [tokens(step, rank) for rank in range(SIZE)]
        alone(*(torch.cat(parts) for parts in zip(*batches, strict=True))).backward()
        close(gradients(ours), gradients(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad"])
def test_optimizers_step_to_the_weights_of_one_process(wrap: Wrap, kind: str) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        if kind == "SGD":
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        if kind == "AdamW":
            return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        return torch.optim.Adagrad(model.parameters(), lr=1e-2)

    ours, alone = wrap(made(Perceptron)), made(Perceptron)
    optimizers = optimizer_of(ours), optimizer_of(alone)
    for step in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        square_loss(ours, step, RANK).backward()
        everything = torch.cat([vectors(step, rank) for rank in range(SIZE)])
        alone(everything).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    close(weights(ours), weights(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["auto", "ring", "halving", "doubling", "native"])
def test_every_algorithm_gives_the_mean(wrap: Wrap, algorithm: str) -> None:
    for width in (0, 3):
        ours = wrap(made(Perceptron), width, algorithm=algorithm, segment_mb=KIB)
        follows_the_mean(ours, square_loss, steps=2)


def trained(wrap: Wrap, case: str, steps: int = 3, width: int = 0, **comm: Any) -> list[Any]:
    """Gradients of each step, and the weights at the end."""
    build, loss = CASES[case]
    ours = wrap(build(), width, **comm)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    found: list[Any] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(ours, step, RANK).backward()
        found.append(gradients(ours))
        optimizer.step()
    return [*found, weights(ours)]


@pytest.mark.parametrize("case", ["gpt", "mixture"])
def test_timing_does_not_change_a_bit(wrap: Wrap, case: str) -> None:
    for width in (0, 2):
        first = trained(wrap, case, width=width)
        for change in (
            {},
            {"overlap": False},
            {"priority": False},
            {"credit_mb": 1e-6},
            {"overlap": False, "priority": False},
        ):
            for one, other in zip(first, trained(wrap, case, width=width, **change), strict=True):
                same_bits(one, other)


def test_reproducible_changes_no_bit_with_buckets_or_placement(wrap: Wrap) -> None:
    first = trained(wrap, "gpt", reproducible=True)
    for width, bucket, segment in (
        (0, 25.0, 2.0),
        (1, 4 * KIB, KIB),
        (2, KIB, KIB),
        (3, 0.01, 2.0),
    ):
        again = trained(
            wrap, "gpt", 3, width, reproducible=True, bucket_mb=bucket, segment_mb=segment
        )
        for one, other in zip(first, again, strict=True):
            same_bits(one, other)
