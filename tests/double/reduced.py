"""The gradient reducer on the test double, under any number of seeds.

The loss is linear in the parameters, so that their gradients are known: small integers, of which
means over 2 or 4 ranks are exact. All of torch's work is queued; the computation may change its
stream half way through a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpcsync.collectives.routes import Facts
from hpcsync.config import CommConfig
from hpcsync.gradients.reducer import Reducer
from tests.double.flows import TOGETHER, TURNS, little_is_much
from tests.double.job import Job, Rank, job
from tests.double.queued import Queued, placed
from tests.double.streams import DoubleStream

SHAPES = ((40, 30), (700,), (50, 50), (11,))


@dataclass(frozen=True)
class Training:
    """A job whose ranks make gradients.

    Attributes:
        aware: MPI takes device memory, and ``mpi_device`` is used.
        streams: in how many streams a step's gradients are made.
    """

    name: str
    ranks: int = 2
    per_node: int = 2
    aware: bool = False
    streams: int = 1

    @contextlib.contextmanager
    def job(self, seed: object) -> Iterator[Job]:
        """The job, in which little memory is much."""
        config = {"segment_mb": 0.01, "bucket_mb": 0.008, "first_bucket_mb": 0.004}
        node = {"per_node": self.per_node, "aware": self.aware}
        with (
            little_is_much(),
            job(self.ranks, (self.name, seed), comm=config, **node) as made,
        ):
            yield made


class Trainer:
    """One rank's side."""

    def __init__(self, rank: Rank, training: Training) -> None:
        self.rank, self.training, self.turn = rank, training, 0
        self.device = rank.device
        self.params = [nn.Parameter(placed(torch.ones(shape), rank.device)) for shape in SHAPES]
        facts = Facts(mpi_device="" if training.aware else "it is not aware of devices")
        self.mode = Queued(rank.device)
        self._entered: list[DoubleStream] = []
        self.streams = [
            self.device.compute,
            *(self.device.new_stream(f"compute{n}") for n in range(1, training.streams)),
        ]
        with self.mode:
            named = [(f"p{index}", param) for index, param in enumerate(self.params)]
            config = CommConfig(**rank.job.comm)
            self.reducer = Reducer(named, rank.collectives(config, facts=facts), config)
        self.named = named

    def run(self) -> list[list[NDArray[Any] | None]]:
        """The means that the steps found, a list a step."""
        found: list[list[Tensor | None]] = []
        for _ in range(TURNS):
            with self.mode:
                self.reducer.prepare(self.named)
                self._backward()
                found.append(
                    [None if each.grad is None else each.grad.clone() for each in self.params]
                )
                for param in self.params:
                    param.grad = None
            self.turn += 1
        return [[None if each is None else self.device.read(each) for each in one] for one in found]

    def _backward(self) -> None:
        rank, turn = self.rank.rank, self.turn
        loss: Any = 0
        for index, param in enumerate(self.params):
            if uses(rank, turn, index):
                stream = self.streams[index % len(self.streams)]
                made = placed(torch.from_numpy(gradient(rank, turn, index)), self.device)
                loss = loss + _Made.apply(param, made, self, stream)
        loss.backward()

    def switch(self, stream: DoubleStream) -> None:
        """Go on in a stream, as autograd does: after what its inputs were made in, and the stream
        of the caller waits for all at the end."""
        if not self._entered:
            self._begun = self.device.compute.record()
            torch.autograd.Variable._execution_engine.queue_callback(self._back)
        else:
            self.device.stack.pop()
        self._entered.append(stream)
        self.device.stack.append(stream)
        stream.wait(self._begun)

    def _back(self) -> None:
        self.device.stack.pop()
        for stream in dict.fromkeys(self._entered):
            if stream is not self.device.compute:
                self.device.compute.wait(stream.record())
        self._entered.clear()


class _Made(torch.autograd.Function):
    """A loss whose gradient is given; the rest of its way through autograd is in ``stream``."""

    @staticmethod
    def forward(
        ctx: Any, param: Tensor, made: Tensor, trainer: Trainer, stream: DoubleStream
    ) -> Tensor:
        ctx.save_for_backward(made)
        ctx.trainer, ctx.stream = trainer, stream
        return param.new_zeros(())

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        (made,) = ctx.saved_tensors
        ctx.trainer.switch(ctx.stream)
        return made * above, None, None, None


def uses(rank: int, turn: int, index: int) -> bool:
    """Whether the rank has a gradient of the parameter in that turn."""
    return not (index == 3 and (turn + rank) % 2) and not (index == 1 and turn % 3 == 2)


def gradient(rank: int, turn: int, index: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng([rank, turn, index])
    return drawn.integers(-64, 64, SHAPES[index]).astype(np.float32)


def mean(ranks: int, turn: int, index: int) -> NDArray[np.float32] | None:
    """What every rank must find."""
    used = [rank for rank in range(ranks) if uses(rank, turn, index)]
    if not used:
        return None
    total = np.zeros(SHAPES[index], np.float32)
    for rank in used:
        total += gradient(rank, turn, index)
    return total / ranks


def first_fault(training: Training, seeds: Sequence[int]) -> str:
    """Train under each seed; the first fault in words, empty if there is none."""
    for start in range(0, len(seeds), TOGETHER):
        some = seeds[start : start + TOGETHER]
        with training.job(some[0]) as made:
            trainers = made.run(lambda rank: Trainer(rank, training))
            for place, seed in enumerate(some):
                made.reseed((training.name, seed))
                if fault := _fault(training, made, trainers, place * TURNS):
                    return f"seed {seed}: {fault}"
    return ""


def _fault(training: Training, made: Job, trainers: Sequence[Trainer], turn: int) -> str:
    found = made.run(lambda rank: trainers[rank.rank].run())
    for rank, steps in enumerate(found):
        for at, grads in enumerate(steps):
            for index, grad in enumerate(grads):
                wanted = mean(training.ranks, turn + at, index)
                same = grad is None if wanted is None else np.array_equal(grad, wanted)
                if not same:
                    return f"rank {rank}, turn {turn + at}, parameter {index} is wrong"
    return ""
