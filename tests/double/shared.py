"""Ranks of the double that share device memory by ``cuda_ipc``.

Values are small whole numbers, so that sums are exact in every type and any order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcsync import schedules
from hpcsync.device import DType
from hpcsync.device.cpu import narrow, widen
from hpcsync.schedules import Kind
from hpcsync.transports.base import Program, Region, Wait
from hpcsync.transports.cuda_ipc import CudaIpc
from tests.double import job as jobs

Array = np.ndarray[Any, Any]
LIMIT_S = 60.0


class Rank:
    """One of the threads of a job, and its transport."""

    def __init__(self, of: jobs.Rank, one_shot: int) -> None:
        self.device, self.rank, self.size = of.device, of.rank, of.size
        comm: Any = of.runtime.group(range(of.size))
        self.transport = CudaIpc(comm, range(of.size), of.device, one_shot=one_shot)
        self.tag = 0
        self._job = of.job

    def region(self, count: int, dtype: DType, slots: int = 8) -> Region:
        buffer = self.transport.allocate(count * dtype.itemsize, slots)
        return Region(buffer, 0, count, dtype, stream=self.device.stream())

    def bind(
        self,
        name: str,
        kind: Kind,
        region: Region,
        divisor: int = 1,
        owners: int | None = None,
        released: bool = False,
    ) -> Program:
        self.tag += 1
        every = schedules.everyone(name, kind, self.size, owners)
        return self.transport.bind(every, region, self.tag, divisor, released)

    def put(self, region: Region, numbers: Array) -> None:
        """Write to a region as the backward pass does: in another stream."""
        dtype, compute = region.dtype, self.device.current()
        stored = numbers.astype(dtype.storage)
        if dtype.name == "bfloat16":
            stored = narrow(numbers.astype(np.float32), dtype)
        self.device.write(region.array, stored, compute)
        assert region.stream is not None
        region.stream.wait(compute.record())

    def join(self, region: Region) -> None:
        """Let what the backward pass writes next come after the exchange."""
        assert region.stream is not None
        self.device.current().wait(region.stream.record())

    def until(self, wait: Wait) -> None:
        limit = time.monotonic() + LIMIT_S
        while not wait.ready():
            self._job.network.check()
            assert time.monotonic() < limit, wait.describe()
            time.sleep(5e-5)

    def drive(self, program: Program) -> None:
        for wait in program.run():
            self.until(wait)

    def copied(self, region: Region) -> Array:
        """What the region holds after the exchange, once its stream is at its end."""
        assert region.stream is not None
        pinned: Array = self.device.pinned(region.nbytes).view(region.dtype.storage)
        region.stream.copy(pinned, region.array)
        return pinned

    def read(self, region: Region) -> Array:
        """What the region holds after the exchange, in float64."""
        pinned = self.copied(region)
        assert region.stream is not None
        region.stream.synchronize()
        stored = pinned.copy()
        return (widen(stored, region.dtype) if region.dtype.name == "bfloat16" else stored).astype(
            np.float64
        )


def job(
    size: int, work: Callable[[Rank], None], seed: object = 0, one_shot: int = 0, **options: Any
) -> None:
    """Do ``work`` as so many ranks; raises what the first of them raised."""

    def main(of: jobs.Rank) -> None:
        own = Rank(of, one_shot)
        work(own)
        for stream in own.device.streams:
            stream.synchronize()
        of.runtime.barrier()  # nobody frees what others read

    with jobs.job(size, seed, **options) as made:
        made.run(main)


def values(rank: int, count: int, seed: int = 0) -> Array:
    """What a rank brings, in float64."""
    return np.random.default_rng([seed, rank]).integers(-9, 10, count).astype(np.float64)


def total(size: int, count: int, seed: int = 0) -> Array:
    return np.sum([values(rank, count, seed) for rank in range(size)], axis=0)
