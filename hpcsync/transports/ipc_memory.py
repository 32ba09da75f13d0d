"""Device memory that the ranks of a node open from one another, tried before it is used."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence

import numpy as np

from ..device import Device, Event, Stream, dtype_of
from ..device.base import Array
from ..errors import DeviceError
from .base import Buffer
from .counters import Slots, header
from .mapped import Gather, SharedMemoryError, share
from .signals import Signals

_BLOCK = 256  # bytes at which copies are aligned
_COPIED = 8  # programs of the largest size that have room for copies; others go the other way
_LINE = 64  # bytes that each rank writes to each memory in a test
_kept: list[Memories] = []  # of jobs that failed


def aligned(nbytes: int) -> int:
    """Bytes that a copy of so many takes."""
    return -(-nbytes // _BLOCK) * _BLOCK


def room(nbytes: int, most: int) -> int:
    """Bytes beside a buffer of ``nbytes`` for two copies each of its parts of up to ``most``."""
    return 2 * min(aligned(nbytes) + _BLOCK * _COPIED, _COPIED * aligned(most))


class IpcBuffer(Buffer):
    """Device memory that every rank of the node has opened.

    Args:
        memories: of each rank: ``nbytes``, and room for copies.

    Attributes:
        slots: the counters of programs.
        copies: room for copies.
        bound: whether a program was bound to it.
        used: by line of counters, the stream of its last program.
    """

    def __init__(
        self, memories: Sequence[Array], rank: int, nbytes: int, maps: Sequence[mmap.mmap]
    ) -> None:
        super().__init__(memories[rank][:nbytes])
        self._memories = memories
        self._nbytes = nbytes
        self.slots = Slots(maps, len(maps[0]))
        self.copies = _Copies(aligned(nbytes), int(memories[rank].shape[0]))
        self.bound = False
        self.used: dict[int, Stream] = {}

    @property
    def shared(self) -> bool:
        return True

    @property
    def queued(self) -> bool:
        return True

    def peer(self, index: int) -> Array:
        return self._memories[index][: self._nbytes]

    def block(self, index: int, start: int, nbytes: int) -> Array:
        """Bytes of the room for copies of the node's rank ``index``."""
        return self._memories[index][start : start + nbytes]


class _Copies:
    """Which of a buffer's room is taken; calls come in the same order on all ranks."""

    def __init__(self, start: int, stop: int) -> None:
        self._next, self._stop = start, stop
        self._free: dict[int, list[tuple[int, Stream]]] = {}

    def take(self, nbytes: int) -> tuple[int, Event | None] | None:
        """Where a block of that size is, and after what it may be written; None if none is left."""
        if self._free.get(nbytes):
            start, stream = self._free[nbytes].pop()
            return start, stream.record()
        if self._next + nbytes > self._stop:
            return None
        self._next += nbytes
        return self._next - nbytes, None

    def give(self, start: int, nbytes: int, stream: Stream) -> None:
        """Take a block back, which the stream may still use."""
        self._free.setdefault(nbytes, []).append((start, stream))


class Memories:
    """The shared memories of a node's ranks.

    Memory must not be freed while a peer has it open, and a peer's stream may still read what this
    rank needs no more. So all are kept till every rank has dropped the buffer, which is asked when
    a buffer is made and when one is first used. All calls are collective.

    Args:
        ranks: job-wide, of the node.
        rank: of this process among them.
    """

    def __init__(self, device: Device, gather: Gather, ranks: Sequence[int], rank: int) -> None:
        self._device, self._gather, self._ranks, self._rank = device, gather, ranks, rank
        self._signals: Signals | None = None
        self._held: list[tuple[weakref.ref[IpcBuffer], list[Array]]] = []

    @property
    def signals(self) -> Signals:
        """Events of the ranks whose memory it is."""
        assert self._signals is not None, "no buffer was made"
        return self._signals

    def make(self, nbytes: int, slots: int, most_copied: int) -> IpcBuffer:
        """A zeroed buffer.

        Args:
            slots: programs that it has counters for.
            most_copied: bytes up to which its parts have room for copies.

        Raises:
            DeviceError: on every rank, if one of them has no room or cannot reach another's memory.
        """
        self.release()
        try:
            maps = share(self._gather, header(slots))
        except SharedMemoryError as error:
            raise DeviceError(f"{error}; enlarge it (containers: --shm-size)") from error
        total = aligned(nbytes) + room(nbytes, most_copied)
        memories = self._reached(max(total, len(self._ranks) * _LINE))
        buffer = IpcBuffer(memories, self._rank, nbytes, maps)
        self._held.append((weakref.ref(buffer), memories))
        return buffer

    def release(self) -> None:
        """Close and free what no rank needs any more."""
        unused = bytes(buffer() is None for buffer, _ in self._held)
        over = [all(flags) for flags in zip(*self._gather(unused), strict=True)]
        if not any(over):
            return
        self.signals.synchronize()
        freed = [memories for (_, memories), gone in zip(self._held, over, strict=True) if gone]
        self._held = [each for each, gone in zip(self._held, over, strict=True) if not gone]
        own = [memories[self._rank] for memories in freed]
        for memories in freed:
            memories.clear()
        self._gather(b"")  # all have closed what others now free
        own.clear()

    def close(self, *, orderly: bool) -> bool:
        """Free everything once no rank uses any of it; programs must be closed before.

        If some rank fails all ranks keep all of it, until their processes end: what its peers'
        streams still have to do nobody knows.

        Args:
            orderly: this rank has not failed.

        Returns:
            Whether it was freed.
        """
        if not orderly or not self._gather.agreed():
            if not orderly:
                self._gather.refuse()
            _kept.append(self)
            return False
        if self._signals is not None:
            self._signals.synchronize()
        self._gather(b"")  # no stream works on any of it
        every = [memories for _, memories in self._held]
        own = [memories[self._rank] for memories in every]
        for memories in every:
            memories.clear()
        self._gather(b"")  # all have closed what others now free
        own.clear()
        self._held.clear()
        return True

    def _reached(self, nbytes: int) -> list[Array]:
        """Memory of each rank, by rank, zeroed, after a test."""
        own, offer = self._own(nbytes)
        memories: list[Array] = []
        problem = ""
        try:
            self._open(own, offer, memories)
            if self._signals is None:
                self._signals = self._exchange_events()
            self._try(memories)
        except DeviceError as error:
            problem = str(error)
        if problem:
            memories.clear()
            self._gather(b"")  # all have closed what others now free
            raise DeviceError(problem)
        return memories

    def _own(self, nbytes: int) -> tuple[Array, bytes]:
        """Memory of this rank, and its offer to the others."""
        problem, offer = "", b""
        own: Array | None = None
        try:
            own = self._device.empty(nbytes, shared=True)
            offer = self._device.offer(own)
        except DeviceError as error:
            problem = str(error)
        self._agree(problem)
        assert own is not None
        return own, offer

    def _open(self, own: Array, offer: bytes, memories: list[Array]) -> None:
        """Fill a list with the memory of each rank."""
        problem = ""
        for who, told in enumerate(self._gather(offer)):
            try:
                memories.append(own if who == self._rank else self._device.open(told))
            except DeviceError as error:
                problem = problem or self._unreachable(who, str(error))
        self._agree(problem)

    def _exchange_events(self) -> Signals:
        signals = Signals(self._device)
        problem, handles = "", ""
        try:
            handles = signals.make()
        except DeviceError as error:
            problem = str(error)
        self._agree(problem)
        every = self._gather.texts(handles)
        try:
            signals.open(every)
        except DeviceError as error:
            problem = str(error)
        self._agree(problem)
        return signals

    def _try(self, memories: Sequence[Array]) -> None:
        """Write to all memories and read them, as sums do, and zero this rank's."""
        device, size, dtype = self._device, len(self._ranks), dtype_of("uint8")
        stream = device.stream()
        given, taken = device.empty(_LINE), device.empty(size * _LINE)
        stream.wait(device.current().record())  # whose memory these two may have been
        stream.fill(given, self._rank % 255 + 1)
        mine = slice(self._rank * _LINE, (self._rank + 1) * _LINE)
        stream.reduce([memory[mine] for memory in memories], [given], dtype)
        stream.synchronize()
        self._gather(b"")  # all have written
        found = device.pinned(size * size * _LINE).reshape(size, size * _LINE)
        for row, memory in zip(found, memories, strict=True):
            stream.reduce([taken], [memory[: size * _LINE]], dtype)
            stream.copy(row, taken)
        stream.synchronize()
        wanted = np.repeat((np.arange(size) % 255 + 1).astype(np.uint8), _LINE)
        wrong = [who for who in range(size) if not np.array_equal(found[who], wanted)]
        wrong.sort(key=lambda who: who == self._rank)  # a peer that cannot write here tells itself
        problem = "what was written there is not what is read"
        self._agree(self._unreachable(wrong[0], problem) if wrong else "")
        stream.fill(memories[self._rank], 0)
        stream.synchronize()
        self._gather(b"")  # all are zeroed, before anybody writes to another's

    def _unreachable(self, who: int, why: str) -> str:
        return (
            f"cuda_ipc: rank {self._ranks[self._rank]} cannot use the device memory of rank "
            f"{self._ranks[who]}: {why}; use comm.transport.node=mpi_staged"
        )

    def _agree(self, problem: str) -> None:
        """Raise on all ranks what one of them found."""
        for found in self._gather.texts(problem):
            if found:
                raise DeviceError(found)
