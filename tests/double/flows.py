"""Exchanges on the test double as a training run makes them, under any number of seeds.

A flow has a few buckets. In every turn the computation writes each of them on its own stream and
starts its exchange at once, goes on with the next, waits for all, and reads the sums on its stream
before the next turn writes there again. What must come out is known exactly.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from hpcsync import codecs
from hpcsync.collectives import Collectives
from hpcsync.collectives.coding import Clock, Coding
from hpcsync.collectives.collective import Collective
from hpcsync.collectives.routes import Facts
from hpcsync.device import dtype_of
from hpcsync.device.cpu import narrow
from hpcsync.transports import cuda_ipc
from hpcsync.transports.base import Region
from hpcsync.transports.mpi_staged import MpiStaged
from tests.double import nccl
from tests.double.job import Job, Rank, job

SETTINGS = codecs.Settings(ratio=0.05, rank=2)
WIDTH = 50  # of a bucket's matrix, for codecs that want one
TURNS = 3  # that a seed lasts
LATE = 12  # once in so many turns a rank comes late to a bucket
LATE_S = 0.04  # by so many seconds at most
TOGETHER = 10  # seeds that one job goes through, one after the other


@contextlib.contextmanager
def little_is_much() -> Iterator[None]:
    """Transports take other ways for much memory: have them do so for little."""
    with (
        mock.patch.object(cuda_ipc, "ONE_SHOT", 8192),
        mock.patch.object(MpiStaged, "most_bytes", 4096),
    ):
        yield


@dataclass(frozen=True)
class Bucket:
    """What one exchange carries.

    Attributes:
        algorithm: over all ranks.
        codec: in which it goes between nodes; none if empty.
        mean: of the ranks, in place of their sum; of whole numbers, too.
    """

    count: int
    dtype: str = "float32"
    algorithm: str = ""
    codec: str = ""
    mean: bool = False


@dataclass(frozen=True)
class Scenario:
    """A job and its buckets.

    Attributes:
        aware: MPI takes device memory, and ``mpi_device`` is used.
        streams: in how many streams the computation goes on, by turns.
        nccl: ranks of a node exchange by it.
    """

    name: str
    buckets: tuple[Bucket, ...]
    ranks: int = 3
    per_node: int = 3
    aware: bool = False
    streams: int = 1
    nccl: bool = False

    @contextlib.contextmanager
    def job(self, seed: object) -> Iterator[Job]:
        """The job, in which little memory is much."""
        config: dict[str, Any] = {"segment_mb": 0.02, "credit_mb": 0.05}
        if self.nccl:
            config["node_transport"] = "nccl"
        node = {"per_node": self.per_node, "aware": self.aware}
        with (
            little_is_much(),
            job(self.ranks, (self.name, seed), comm=config, **node) as made,
            nccl.installed(made.machine),
        ):
            yield made


class Flow:
    """One rank's side of a scenario.

    Args:
        on_device: else the same on the host.
    """

    def __init__(self, rank: Rank, scenario: Scenario, *, on_device: bool = True) -> None:
        self.rank, self.scenario = rank, scenario
        facts = Facts(mpi_device="" if scenario.aware else "it is not aware of devices", nccl="")
        self.collectives: Collectives = rank.collectives(facts=facts, device=on_device)
        self.device = self.collectives.device
        self.turn = 0
        self.clock = Clock()
        sizes = [bucket.count * dtype_of(bucket.dtype).itemsize for bucket in scenario.buckets]
        starts = np.cumsum([0, *(-(-size // 256) * 256 for size in sizes)])
        self.arena = self.collectives.arena(
            int(starts[-1]), bindings=2, pieces=len(scenario.buckets)
        )
        self.regions = [
            Region(self.arena, int(start), bucket.count, dtype_of(bucket.dtype))
            for bucket, start in zip(scenario.buckets, starts, strict=False)
        ]
        self.bound = [self._bind(number) for number in range(len(scenario.buckets))]
        self.streams = [self.device.current()]
        if on_device:
            self.streams += [
                rank.device.new_stream(f"compute{n}") for n in range(1, scenario.streams)
            ]

    def _bind(self, number: int) -> Collective:
        bucket, region = self.scenario.buckets[number], self.regions[number]
        coding = None
        if bucket.codec:
            coding = Coding(
                codec=codecs.build(bucket.codec, SETTINGS, device=self.device),
                where="rail" if self.scenario.per_node < self.scenario.ranks else "all",
                count=bucket.count,
                matrices=(codecs.Matrix(0, (bucket.count // WIDTH, WIDTH)),),
                seed=number,
                clock=self.clock,
            )
        return self.collectives.allreduce(
            self.arena,
            region.dtype,
            count=region.count,
            offset=region.offset,
            average=bucket.mean,
            algorithm=bucket.algorithm,
            label=f"bucket {number}",
            coding=coding,
            bucket=number,
        )

    def run(self, turns: int = TURNS) -> list[NDArray[Any]]:
        """The sums of all buckets, turn by turn."""
        found: list[Any] = []
        for _ in range(turns):
            stream = self.streams[self.turn % len(self.streams)]
            before = self.streams[(self.turn - 1) % len(self.streams)]
            if stream is not before:
                stream.wait(before.record())
            with stream:
                found += self._turn()
            self.turn += 1
            self.clock.step += 1
        if not self.device.queued:
            return found
        return [self.rank.device.read(each) for each in found]

    def _turn(self) -> list[Any]:
        stream = self.device.current()
        for number, (collective, region) in enumerate(zip(self.bound, self.regions, strict=True)):
            values = values_of(self.scenario, number, self.turn, self.rank.rank)
            if self.device.queued:
                self.rank.device.write(region.array, values)
            else:
                region.array[:] = values
            self._dawdle()
            collective.start(0, [stream.record()])
        made = []
        for collective, region in zip(self.bound, self.regions, strict=True):
            collective.wait()
            collective.join(stream)
            copy = self.device.empty(region.nbytes).view(region.dtype.storage)
            stream.copy(copy, region.array)
            stream.fill(region.array, 0xFF)
            made.append(copy)
        return made

    def _dawdle(self) -> None:
        """The host is late now and then, so that its peers have gone on as far as they can."""
        if self.rank.device.late.below(LATE * len(self.bound)) == 0:
            time.sleep(self.rank.device.late.below(1000) / 1000 * LATE_S)


@functools.lru_cache(maxsize=4096)
def values_of(scenario: Scenario, number: int, turn: int, rank: int) -> NDArray[Any]:
    """What a rank gives to a bucket: small integers, whose sums are exact in every type."""
    bucket = scenario.buckets[number]
    dtype = dtype_of(bucket.dtype)
    drawn = np.random.default_rng([number, turn, rank]).integers(-30, 30, bucket.count)
    if bucket.mean:
        drawn *= scenario.ranks
    if dtype.storage == dtype.accumulate:
        return drawn.astype(dtype.storage)
    return narrow(drawn.astype(np.float32), dtype)


def sums_of(scenario: Scenario, number: int, turn: int) -> NDArray[Any]:
    """What an exchange that is not coded gives; ``values_of`` makes means as large as sums."""
    dtype = dtype_of(scenario.buckets[number].dtype)
    total = np.zeros(scenario.buckets[number].count, np.int64)
    for rank in range(scenario.ranks):
        total += np.random.default_rng([number, turn, rank]).integers(-30, 30, total.shape[0])
    if dtype.storage == dtype.accumulate:
        return total.astype(dtype.storage)
    return narrow(total.astype(np.float32), dtype)


class Expected:
    """What a flow must give, turn by turn; coded buckets as on the host.

    Args:
        turns: that will be asked for.
    """

    def __init__(self, scenario: Scenario, turns: int) -> None:
        count = len(scenario.buckets)
        self._sums = [
            sums_of(scenario, number, turn) for turn in range(turns) for number in range(count)
        ]
        if any(bucket.codec for bucket in scenario.buckets):
            with scenario.job("host") as made:
                self._by_rank = made.run(
                    lambda rank: Flow(rank, scenario, on_device=False).run(turns)
                )
            return
        self._by_rank = [self._sums] * scenario.ranks

    def check(self, found: Sequence[Sequence[NDArray[Any]]], turn: int, count: int) -> str:
        """What is wrong with the sums of all ranks from a turn on; empty for nothing."""
        for rank, sums in enumerate(found):
            for place, values in enumerate(sums):
                wanted = self._by_rank[rank][turn * count + place]
                if not np.array_equal(values.view(np.uint8), wanted.view(np.uint8)):
                    wrong = int((values != wanted).sum())
                    at, number = divmod(place, count)
                    return (
                        f"rank {rank}, turn {turn + at}, bucket {number}: {wrong} of "
                        f"{wanted.shape[0]} elements are wrong"
                    )
        return ""


def first_fault(scenario: Scenario, seeds: Sequence[int]) -> str:
    """Run the scenario under each seed; the first fault in words, empty if there is none."""
    expected = _expected(scenario)
    for start in range(0, len(seeds), TOGETHER):
        some = seeds[start : start + TOGETHER]
        with scenario.job(some[0]) as made:
            flows = made.run(lambda rank: Flow(rank, scenario))
            for place, seed in enumerate(some):
                made.reseed((scenario.name, seed))
                if fault := _fault(made, flows, expected, place * TURNS):
                    return f"seed {seed}: {fault}"
    return ""


@functools.cache
def _expected(scenario: Scenario) -> Expected:
    return Expected(scenario, TURNS * TOGETHER)


def _fault(made: Job, flows: Sequence[Flow], expected: Expected, turn: int) -> str:
    found = made.run(lambda rank: flows[rank.rank].run())
    return expected.check(found, turn, len(flows[0].bound))
