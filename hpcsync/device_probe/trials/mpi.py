"""MPI on device memory, from this process to itself: a library that cannot take it dies here."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ... import launch
from ...children import tell
from ...device.base import Device
from . import NBYTES, down, pattern, same, say, up

# Of a message: sent at once, in pieces, and by whatever moves bulk.
SIZES = (256, 1 << 16, NBYTES - 64)
_START = 64  # messages begin within a buffer


def run(device: Device, _spec: str, _index: int, _env: Mapping[str, str]) -> None:
    """Prepared messages as a program has them, and those that are made afresh."""
    comm = launch.world()
    name, path = launch.mpi_library()
    tell(library=name, path=path)
    exchange(device, comm, comm.Get_rank(), name)


def exchange(device: Device, comm: object, peer: int, name: str) -> None:
    """Send to ``peer`` and receive from it what it sends alike.

    Raises:
        FailedError: something else arrived.
    """
    from mpi4py import MPI

    assert isinstance(comm, MPI.Intracomm)
    rank = comm.Get_rank()
    for prepared in (True, False):
        for size in SIZES:
            how = "prepared message" if prepared else "message"
            say(f"giving device memory to {name}: a {how} of {size} bytes")
            sent = up(device, pattern(NBYTES, size + rank))
            found = up(device, pattern(NBYTES, 7))
            part = slice(_START, _START + size)
            given, taken = [sent[part], MPI.BYTE], [found[part], MPI.BYTE]
            requests: list[MPI.Request] = []
            if prepared:
                begun = [comm.Recv_init(taken, peer), comm.Send_init(given, peer)]
                MPI.Prequest.Startall(begun)
                requests += begun
            else:
                requests += [comm.Irecv(taken, peer), comm.Isend(given, peer)]
            while not MPI.Request.Testall(requests):
                time.sleep(1e-4)
            if prepared:
                for request in requests:
                    request.Free()
            wanted = pattern(NBYTES, 7)
            wanted[part] = pattern(NBYTES, size + peer)[part]
            same(down(device, found), wanted, f"a {how} of {size} bytes by {name}")
