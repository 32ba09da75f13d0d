"""A device whose memory is the host's, for children that try one; FAULT names what is to go wrong.

``FAULT="sharing crash"``: that trial ends by a signal; others hang, raise, or give wrong contents.
Nothing does where the variable is set that FAULT_UNLESS names.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import tempfile
import time
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from hpcsync import launch
from hpcsync.device.base import Array, Event, SharedEvent
from hpcsync.device.cpu import CpuDevice
from hpcsync.errors import DeviceError

SPEC = f"{__name__}:FileDevice"


class FileEvent(SharedEvent):
    """Always ready: work of the host is done while it is given."""

    handle = b"event"

    def ready(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class BadComm(MPI.Intracomm):
    """Of an MPI that cannot take device memory."""

    def Send_init(self, *_: Any) -> MPI.Prequest:  # noqa: N802
        go_wrong("mpi")
        return super().Send_init([np.zeros(0, np.uint8), MPI.BYTE], MPI.PROC_NULL)

    def Recv_init(self, *_: Any) -> MPI.Prequest:  # noqa: N802
        return super().Recv_init([np.zeros(0, np.uint8), MPI.BYTE], MPI.PROC_NULL)


def fault() -> tuple[str, str]:
    """The trial that is to go wrong, and how."""
    trial, _, how = os.environ.get("FAULT", "").partition(" ")
    if os.environ.get("FAULT_UNLESS", "-") in os.environ:
        return "", ""
    return trial, how


def go_wrong(trial: str) -> None:
    """What is asked for at this place of a trial, if anything."""
    wanted, how = fault()
    if wanted != trial:
        return
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(600)
    if how == "raise":
        raise DeviceError("it cannot\nbe done")


class FileDevice(CpuDevice):
    """Memory that others open is a file."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.pair = index, os.environ.get("OMPI_COMM_WORLD_SIZE") == "2"
        go_wrong("start")
        if fault()[0] == "mpi":
            own = BadComm(MPI.COMM_SELF)
            launch.world = lambda: own  # type: ignore[assignment]

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        if self.pair:
            go_wrong("mpi_pair")
        go_wrong("memory")
        return super().pinned(nbytes)

    def empty(self, nbytes: int, *, shared: bool = False) -> Array:
        if not shared:
            made = super().empty(nbytes)
            return made.view(_Forgetful) if fault() == ("memory", "wrong") else made
        go_wrong("sharing")
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.truncate(nbytes)
            memory = np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8)
        self.path = file.name
        return memory

    def offer(self, array: Array) -> bytes:
        return self.path.encode()

    def open(self, offer: bytes) -> Array:
        go_wrong("opening")
        with open(offer, "r+b") as file:
            made = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        os.unlink(offer)
        return np.array(made) if fault() == ("opening", "wrong") else made

    def shared_event(self) -> SharedEvent:
        return FileEvent()

    def open_event(self, handle: bytes) -> Event:
        assert handle == FileEvent.handle
        return FileEvent()


class _Forgetful(np.ndarray[Any, Any]):
    """Memory that does not hold what is written to it from its 100th byte on."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if self.nbytes > 100:
            super().__setitem__(slice(100, 101), 77)


if __name__ == "__main__":
    sys.exit("a module for tests")
