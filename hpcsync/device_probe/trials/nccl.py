"""NCCL by CuPy, with one rank: whether it is there, starts, and moves what this device holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...device.base import Device
from ...device.cuda_launch import address_of
from . import FailedError, down, same, say, up

_COUNT = 4096


def run(device: Device, _spec: str, _index: int, _env: Mapping[str, str]) -> None:
    """Start it and have it send to itself, as ranks send to each other.

    Raises:
        FailedError: CuPy has no NCCL.
    """
    from cupy.cuda import nccl

    say("starting NCCL")
    if not nccl.available:
        raise FailedError("CuPy finds no NCCL library: `pip install nvidia-nccl-cu12` (or -cu13)")
    given = np.arange(_COUNT, dtype=np.float32)
    source, out = up(device, given), up(device, np.zeros(_COUNT, np.float32))
    comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    say("a message by NCCL")
    stream = device.stream()

    def send() -> None:
        import cupy

        at = cupy.cuda.get_current_stream().ptr
        nccl.groupStart()
        comm.send(address_of(source), given.nbytes, nccl.NCCL_UINT8, 0, at)
        comm.recv(address_of(out), given.nbytes, nccl.NCCL_UINT8, 0, at)
        nccl.groupEnd()

    stream.apply(send)
    stream.synchronize()
    same(down(device, out), given, "a message by NCCL")
