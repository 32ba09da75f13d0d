"""Buffers of a model on the test double, under any number of seeds.

Two sets of buffers take turns, each in a stream of its own that knows nothing of the other's, as
forward passes in two streams have them. Every rank writes into its set, and must find rank 0's.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcsync.collectives.routes import Facts
from hpcsync.parallel import buffers
from hpcsync.parallel.buffers import DeviceBuffers
from tests.double.flows import TOGETHER, TURNS, little_is_much
from tests.double.job import Job, Rank, job
from tests.double.queued import Queued, placed

FORMS: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
    ((40, 30), torch.float32),
    ((), torch.int64),
    ((0,), torch.float32),
    ((700,), torch.bfloat16),
    ((33, 20), torch.float64),
)
GROUP = 4096  # bytes that travel together
SETS = 2
LATE_S = 0.5  # that a pass waits for the next one to be given, at most


@dataclass(frozen=True)
class Buffered:
    """A job whose ranks have buffers.

    Attributes:
        aware: MPI takes device memory, and ``mpi_device`` is used.
        overtakes: passes of the first stream wait until one of the other is given; not where MPI
            has to wait for them.
    """

    name: str
    ranks: int = 2
    per_node: int = 2
    aware: bool = False
    overtakes: bool = False

    @contextlib.contextmanager
    def job(self, seed: object) -> Iterator[Job]:
        """The job, in which little memory is much."""
        config = {"segment_mb": 0.01}
        node = {"per_node": self.per_node, "aware": self.aware}
        with (
            little_is_much(),
            mock.patch.object(buffers, "_GROUP", GROUP),
            job(self.ranks, (self.name, seed), comm=config, **node) as made,
        ):
            yield made


class Holder:
    """One rank's side."""

    def __init__(self, rank: Rank, scenario: Buffered) -> None:
        self.rank, self.device, self.turn = rank, rank.device, 0
        facts = Facts(mpi_device="" if scenario.aware else "it is not aware of devices")
        self.sender = DeviceBuffers(rank.collectives(facts=facts))
        self.mode = Queued(rank.device)
        self.overtakes = scenario.overtakes
        self.streams = [rank.device.new_stream(f"compute{number}") for number in range(SETS)]
        self.sets = [
            [
                placed(torch.zeros(shape[::-1], dtype=dtype), rank.device).permute(
                    tuple(reversed(range(len(shape))))
                )
                for shape, dtype in FORMS
            ]
            for _ in range(SETS)
        ]
        rank.machine.synchronize()

    def run(self) -> list[Tensor]:
        """What this rank found in its buffers, turn by turn, as bytes; not there yet."""
        found: list[Tensor] = []
        given = threading.Event()
        for _ in range(TURNS):
            mine = self.sets[self.turn % SETS]
            stream = self.streams[self.turn % SETS]
            with stream, self.mode:
                if self.overtakes and stream is self.streams[0]:
                    given = threading.Event()
                    stream.apply(functools.partial(given.wait, LATE_S))
                for index, each in enumerate(mine):
                    if not each.numel():
                        continue
                    values = torch.from_numpy(values_of(self.rank.rank, self.turn, index))
                    each.copy_(placed(values, self.device).view(each.dtype).view(each.shape))
                self.sender.broadcast(mine)
                for each in mine:
                    found.append(each.contiguous().view(-1).view(torch.uint8).clone())
                    each.zero_()
            if stream is not self.streams[0]:
                given.set()
            self.turn += 1
        given.set()
        return found


def values_of(rank: int, turn: int, index: int) -> NDArray[np.uint8]:
    """Bytes of a buffer: any at all, NaN among them."""
    shape, dtype = FORMS[index]
    nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
    return np.random.default_rng([rank, turn, index]).integers(0, 256, nbytes, np.uint8)


def first_fault(scenario: Buffered, seeds: Sequence[int]) -> str:
    """Run it under each seed; the first fault in words, empty if there is none."""
    for start in range(0, len(seeds), TOGETHER):
        some = seeds[start : start + TOGETHER]
        with scenario.job(some[0]) as made:
            holders = made.run(lambda rank: Holder(rank, scenario))
            for place, seed in enumerate(some):
                made.reseed((scenario.name, seed))
                if fault := _fault(made, holders, place * TURNS):
                    return f"seed {seed}: {fault}"
    return ""


def _fault(made: Job, holders: Sequence[Holder], turn: int) -> str:
    found = made.run(lambda rank: holders[rank.rank].run())
    made.machine.synchronize()
    for rank, tensors in enumerate(found):
        for place, values in enumerate(tensors):
            at, index = divmod(place, len(FORMS))
            if not np.array_equal(values.numpy(), values_of(0, turn + at, index)):
                return f"rank {rank}, turn {turn + at}, buffer {index} is wrong"
    return ""
