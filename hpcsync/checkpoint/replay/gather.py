"""Bytes of every rank on every rank."""

from __future__ import annotations

import numpy as np

from ...runtime import Runtime
from .records import Bytes

_MOST = 1 << 30  # classic MPI counts have 31 bits


def gather(runtime: Runtime, mine: Bytes) -> list[Bytes]:
    """Each rank's bytes, by rank; collective."""
    from mpi4py import MPI

    lengths = np.zeros(runtime.size, np.int64)
    runtime.wait(runtime.comm.Iallgather(np.array([mine.shape[0]], np.int64), lengths))
    sizes = [int(length) for length in lengths]
    if sum(sizes) <= _MOST:
        starts = [sum(sizes[:rank]) for rank in range(runtime.size)]
        whole = np.empty(sum(sizes), np.uint8)
        runtime.wait(runtime.comm.Iallgatherv(mine, [whole, sizes, starts, MPI.BYTE]))
        return [whole[at : at + size] for at, size in zip(starts, sizes, strict=True)]
    found = []
    for rank, size in enumerate(sizes):
        part = mine if rank == runtime.rank else np.empty(size, np.uint8)
        runtime.broadcast_array(part, rank)
        found.append(part)
    return found
