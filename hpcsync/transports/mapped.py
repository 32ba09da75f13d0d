"""Memory that all ranks of a node have mapped, and what they tell each other to come to it."""

from __future__ import annotations

import errno
import json
import mmap
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import HpcsyncError

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

FOLDER = "/dev/shm"
PREFIX = "hpcsync-"


class SharedMemoryError(HpcsyncError):
    """The node's shared memory cannot hold a buffer."""


_refused: list[object] = []  # messages, and their memory, to the end of the process


class Gather:
    """What the ranks of a group tell each other while setting up; each call is collective.

    Args:
        wait: for a request, without spinning.
    """

    def __init__(self, comm: Intracomm, wait: Callable[[Request], None] | None = None) -> None:
        self._comm = comm
        self._wait = wait or _wait
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def __call__(self, data: bytes) -> list[bytes]:
        """The bytes of every rank."""
        lengths = np.empty(self.size, np.int64)
        self._wait(self._comm.Iallgather(np.array([len(data)], np.int64), lengths))
        width = int(lengths.max())
        if not width:
            return [b""] * self.size
        mine = np.zeros(width, np.uint8)
        mine[: len(data)] = np.frombuffer(data, np.uint8)
        every = np.empty((self.size, width), np.uint8)
        self._wait(self._comm.Iallgather(mine, every))
        return [row[:length].tobytes() for row, length in zip(every, lengths, strict=True)]

    def agreed(self) -> bool:
        """Whether no rank has refused, by ``refuse`` in place of this call."""
        every = np.empty(self.size, np.int64)
        self._wait(self._comm.Iallgather(np.ones(1, np.int64), every))
        return bool(every.all())

    def refuse(self) -> None:
        """Tell those who ask whether all agree, and wait for nobody; nothing may follow."""
        mine, every = np.zeros(1, np.int64), np.empty(self.size, np.int64)
        _refused.append((self._comm.Iallgather(mine, every), mine, every))

    def texts(self, text: str) -> list[str]:
        """The text of every rank."""
        return [each.decode() for each in self(text.encode())]


def _wait(request: Request) -> None:
    while not request.Test():
        time.sleep(1e-4)


class _Offer(NamedTuple):
    """A rank's file: where it can be opened, its number, and why there is none."""

    path: str
    inode: int
    problem: str


def share(gather: Gather, nbytes: int) -> list[mmap.mmap]:
    """A zeroed file of every rank of the node, by rank, mapped by all; collective.

    Raises:
        SharedMemoryError: on every rank of the node, if one of them found no room.
    """
    # All are there before anything is made: a rank that is gone leaves no file behind.
    gather(b"")
    maps = _share(gather, nbytes, named=False) or _share(gather, nbytes, named=True)
    if not maps:
        raise SharedMemoryError(f"{FOLDER}: the ranks of the node cannot map each other's file")
    return maps


def _share(gather: Gather, nbytes: int, *, named: bool) -> list[mmap.mmap]:
    """Every rank's file mapped; none if some rank could not open another's.

    A file without a name vanishes with its last user, however that ends. Peers open it
    through /proc, which ranks in containers of their own cannot: those get a named file,
    unlinked as soon as all have it.
    """
    name = f"{FOLDER}/{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}" if named else ""
    handle, problem = -1, ""
    maps: list[mmap.mmap] = []
    try:
        try:
            handle = create(name, nbytes)
        except OSError as error:
            if named or error.errno == errno.ENOSPC:
                problem = f"{FOLDER}: {error.strerror} for {nbytes >> 20} MiB"
        path = name if named or handle < 0 else f"/proc/{os.getpid()}/fd/{handle}"
        mine = _Offer(path, os.fstat(handle).st_ino if handle >= 0 else 0, problem)
        offers = [_Offer(*json.loads(text)) for text in gather.texts(json.dumps(mine))]
        faults = [offer.problem for offer in offers if offer.problem]
        if not faults:
            maps = _map_all(offers, nbytes)
        if "" in gather.texts("mapped" if maps else ""):
            maps = []
    finally:
        if handle >= 0:
            os.close(handle)
            if named:
                os.unlink(name)
    if faults:
        raise SharedMemoryError(faults[0])
    return maps


def create(name: str, nbytes: int) -> int:
    """An open file of ``nbytes`` reserved bytes: a hole would be a SIGBUS later."""
    flags = os.O_CREAT | os.O_EXCL if name else os.O_TMPFILE
    handle = os.open(name or FOLDER, flags | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except OSError:
        os.close(handle)
        if name:
            os.unlink(name)
        raise
    return handle


def _map_all(offers: Sequence[_Offer], nbytes: int) -> list[mmap.mmap]:
    """The files mapped, or none of them."""
    maps = []
    for offer in offers:
        try:
            handle = os.open(offer.path, os.O_RDWR)
        except OSError:
            return []
        try:
            # In another container the same process number names another process's file.
            if os.fstat(handle).st_ino != offer.inode:
                return []
            maps.append(mmap.mmap(handle, nbytes))
        except (OSError, ValueError):
            return []
        finally:
            os.close(handle)
    return maps
