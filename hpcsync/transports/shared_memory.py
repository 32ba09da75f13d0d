"""Ranks of one node read and write each other's memory; nothing is sent.

Every rank puts its buffer into a POSIX shared-memory file (mode 0600) which all ranks of the
node map and which has no name any more once they have: a killed job leaves nothing behind.

Two counters a rank and program order the accesses. ``entered`` says that the rank has reached
a step: what it offers there is final, and what it will receive may be written. ``left`` says
that it has read and written all that the step asks for. Sums are pulled by the rank that owns
them, results are pushed into the others' memory:

    step     rank 0                        rank 1
    enter    entered[0] = s                entered[1] = s
    work     add rank 1's chunk to mine    add rank 0's chunk to mine
    leave    left[0] = s                   left[1] = s
    wait for left of those I touched, or that touched me

A counter is one aligned 8-byte word with one writer. Processors that reorder stores get a full
fence from a lock's release and acquire.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..device import Device
from ..device.base import Array
from ..errors import HpcsyncError
from ..schedules.base import Action, Kind, Schedule, Step
from .base import Buffer, Program, Region, Transport, Wait, chunk_offsets, final_sum

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

FOLDER = "/dev/shm"
PREFIX = "hpcsync-"
_LINE = 8  # words of 8 bytes a counter pair: a cache line, so that ranks do not share one
_STRIDE = 1 << 20  # steps a run may have; runs are told apart by multiples of it
_TEXT = 256  # bytes of a message while setting up
_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")


class SharedMemoryError(HpcsyncError):
    """The node's shared memory cannot hold a buffer."""


class SharedBuffer(Buffer):
    """A buffer that every rank of the node has mapped.

    Attributes:
        words: the counters of each rank, as 64-bit words.
        runs: how often each pair of counters has been used, the same on every rank.
    """

    def __init__(self, maps: Sequence[mmap.mmap], rank: int, header: int, nbytes: int) -> None:
        self._peers = [np.frombuffer(each, np.uint8, nbytes, header) for each in maps]
        self.words = [memoryview(each)[:header].cast("Q") for each in maps]
        self.runs = [0] * (header // (8 * _LINE))
        self._free = list(reversed(range(len(self.runs))))
        super().__init__(self._peers[rank])

    @property
    def shared(self) -> bool:
        return True

    def peer(self, index: int) -> Array:
        return self._peers[index]

    def take_slot(self) -> int:
        """A free pair of counters; calls come in the same order on all ranks.

        Raises:
            HpcsyncError: all are taken; ``Collectives.buffer`` was told of too few bindings.
        """
        if not self._free:
            raise HpcsyncError(
                f"a shared buffer has counters for {len(self.runs)} programs, and all are in use; "
                "close collectives that are not needed, or make it for more bindings"
            )
        return self._free.pop()

    def give_slot(self, slot: int) -> None:
        """Take back the counters of a program that will not run again.

        Their values stay, and so does the number of runs: the next program counts on from it.
        """
        self._free.append(slot)


class SharedMemory(Transport):
    """Direct access between the ranks of a node.

    Args:
        comm: the node's communicator; used for setting up only.
    """

    name = "shared_memory"

    def __init__(
        self,
        comm: Intracomm,
        ranks: Sequence[int],
        device: Device,
        wait: Callable[[Request], None] | None = None,
    ) -> None:
        super().__init__(ranks, comm.Get_rank(), device)
        self._comm = comm
        self._wait = wait or _wait
        self._fence = threading.Lock()

    def allocate(self, nbytes: int, slots: int) -> SharedBuffer:
        """A zeroed buffer of ``nbytes`` on every rank of the node, with counters for ``slots``
        programs; collective over the node.

        Raises:
            SharedMemoryError: on every rank of the node, if one of them found no room.
        """
        header = -(-slots * _LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
        total = header + max(nbytes, 1)
        # All are there before anything is made: a rank that is gone leaves no file behind.
        self._gather("")
        maps = self._share(total, named=False) or self._share(total, named=True)
        if not maps:
            raise SharedMemoryError(f"{FOLDER}: the ranks of the node cannot map each other's file")
        return SharedBuffer(maps, self.rank, header, nbytes)

    def _share(self, total: int, *, named: bool) -> list[mmap.mmap]:
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
                handle = self._create(name, total)
            except OSError as error:
                if named or error.errno == errno.ENOSPC:
                    problem = f"{FOLDER}: {error.strerror} for {total >> 20} MiB"
            path = name if named or handle < 0 else f"/proc/{os.getpid()}/fd/{handle}"
            mine = _Offer(path, os.fstat(handle).st_ino if handle >= 0 else 0, problem)
            offers = [_Offer(*json.loads(text)) for text in self._gather(json.dumps(mine))]
            faults = [offer.problem for offer in offers if offer.problem]
            if not faults:
                maps = _map_all(offers, total)
            if "" in self._gather("mapped" if maps else ""):
                maps = []
        finally:
            if handle >= 0:
                os.close(handle)
                if named:
                    os.unlink(name)
        if faults:
            raise SharedMemoryError(faults[0])
        return maps

    @staticmethod
    def _create(name: str, total: int) -> int:
        """An open file of ``total`` reserved bytes: a hole would be a SIGBUS later."""
        flags = os.O_CREAT | os.O_EXCL if name else os.O_TMPFILE
        handle = os.open(name or FOLDER, flags | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(handle, 0, total)
        except OSError:
            os.close(handle)
            if name:
                os.unlink(name)
            raise
        return handle

    def _gather(self, text: str) -> list[str]:
        """A short text of every rank of the node, without spinning."""
        mine = np.zeros(_TEXT, np.uint8)
        data = text.encode()[:_TEXT]
        mine[: len(data)] = np.frombuffer(data, np.uint8)
        every = np.empty((self.size, _TEXT), np.uint8)
        self._wait(self._comm.Iallgather(mine, every))
        return [row.tobytes().rstrip(b"\0").decode() for row in every]

    def bind(
        self,
        schedules: Sequence[Schedule],
        region: Region,
        tag: int,
        divisor: int = 1,
        released: bool = False,
    ) -> Program:
        buffer = region.buffer
        assert isinstance(buffer, SharedBuffer), "shared_memory needs a shared buffer"
        counters = _Counters(self, buffer, buffer.take_slot())
        schedule = schedules[self.rank]
        assert schedule.name != "native", "native is MPI's own"
        if schedule.name == "direct":
            return _Direct(self, counters, schedule, region, divisor, released)
        return _Stepwise(self, counters, schedules, region, divisor)

    def fence(self) -> None:
        """Order this thread's memory accesses before and after the call."""
        if not _ORDERED:
            with self._fence:
                pass


def _wait(request: Request) -> None:
    while not request.Test():
        time.sleep(1e-4)


class _Offer(NamedTuple):
    """A rank's file: where it can be opened, its number, and why there is none."""

    path: str
    inode: int
    problem: str


def _map_all(offers: Sequence[_Offer], total: int) -> list[mmap.mmap]:
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
            maps.append(mmap.mmap(handle, total))
        except (OSError, ValueError):
            return []
        finally:
            os.close(handle)
    return maps


class _Counters:
    """The ``entered`` and ``left`` counters of one program."""

    ENTERED, LEFT = 0, 1

    def __init__(self, transport: SharedMemory, buffer: SharedBuffer, slot: int) -> None:
        self.transport = transport
        self.words = buffer.words
        self.base = slot * _LINE
        self.run = 0
        self._buffer = buffer
        self._slot = slot

    def begin(self) -> None:
        self._buffer.runs[self._slot] += 1
        self.run = self._buffer.runs[self._slot]

    def close(self) -> None:
        self._buffer.give_slot(self._slot)

    def enter(self, step: int) -> None:
        self._set(self.ENTERED, step)

    def leave(self, step: int) -> None:
        self._set(self.LEFT, step)

    def _set(self, which: int, step: int) -> None:
        self.transport.fence()
        self.words[self.transport.rank][self.base + which] = self.run * _STRIDE + step + 1

    def until(self, which: int, peers: Sequence[tuple[int, int]]) -> _Counted:
        """Until each (rank, step) of ``peers`` has entered or left its step."""
        return _Counted(self, which, [(who, self.run * _STRIDE + at + 1) for who, at in peers])


class _Counted(Wait):
    """Waits until counters of other ranks have come up to given values."""

    __slots__ = ("_counters", "_missing", "_which")

    def __init__(self, counters: _Counters, which: int, missing: list[tuple[int, int]]) -> None:
        self._counters = counters
        self._which = which
        self._missing = missing

    def ready(self) -> bool:
        words, missing = self._counters.words, self._missing
        index = self._counters.base + self._which
        while missing:
            who, value = missing[-1]
            if words[who][index] < value:
                return False
            missing.pop()
        self._counters.transport.fence()
        return True

    def describe(self) -> str:
        counters = self._counters
        index = counters.base + self._which
        verb = "reach" if self._which == _Counters.ENTERED else "leave"
        places = [
            f"rank {counters.transport.ranks[who]} to {verb} {_place(value)} "
            f"(it is at {_place(counters.words[who][index])})"
            for who, value in reversed(self._missing)
            if counters.words[who][index] < value
        ]
        return f"shared_memory: waits for {', '.join(places) or 'nothing more'}"


def _place(word: int) -> str:
    """A counter's value in words."""
    run, step = divmod(word - 1, _STRIDE)
    return f"step {step} of run {run}" if word else "its start"


class _Direct(Program):
    """The direct schedule: each owner pulls and adds its chunk, then pushes the result.

    As allreduce both halves are one pass: a block is pushed while it is still in cache. The
    waits between the halves fall away, since a chunk is touched by nobody but its owner from
    the moment everyone has entered until the owner has left. For the same reason an allgather
    that follows the reduce-scatter need not wait for the others to enter.
    """

    def __init__(
        self,
        transport: SharedMemory,
        counters: _Counters,
        schedule: Schedule,
        region: Region,
        divisor: int,
        released: bool,
    ) -> None:
        self._released = released
        self._device = transport.device
        self._dtype = region.dtype
        self._counters = counters
        self._kind = schedule.kind
        self._divisor = divisor
        offsets = chunk_offsets(schedule, region)
        low, high = (
            (transport.rank, min(transport.rank + 1, schedule.chunks))
            if schedule.kind is Kind.ALLREDUCE
            else schedule.owned
        )
        part = slice(offsets[min(low, high)], offsets[high])
        self._views = [region.peer(index)[part] for index in range(transport.size)]
        self._mine = transport.rank
        self._others = [index for index in range(transport.size) if index != transport.rank]

    def run(self) -> Iterator[Wait]:
        counters, mine = self._counters, self._views[self._mine]
        counters.begin()
        counters.enter(0)
        if not self._released:
            yield counters.until(counters.ENTERED, [(who, 0) for who in self._others])
        if mine.shape[0]:
            self._work(mine)
        counters.leave(0)
        if self._kind is not Kind.REDUCE_SCATTER:
            yield counters.until(counters.LEFT, [(who, 0) for who in self._others])

    def close(self) -> None:
        self._counters.close()

    def _work(self, mine: Array) -> None:
        if self._kind is Kind.ALLGATHER:
            for who in self._others:
                self._device.copy(self._views[who], mine)
            return
        # This rank's own copy comes first among the outputs: the others are copied from it.
        outs = [mine]
        if self._kind is Kind.ALLREDUCE:
            outs += [self._views[who] for who in self._others]
        self._device.reduce(outs, self._views, self._dtype, self._divisor)


class _Stepwise(Program):
    """Any other schedule, step by step, by pulling."""

    def __init__(
        self,
        transport: SharedMemory,
        counters: _Counters,
        schedules: Sequence[Schedule],
        region: Region,
        divisor: int,
    ) -> None:
        self._transport = transport
        self._device: Device = transport.device
        self._counters = counters
        self._region = region
        self._divisor = divisor
        self._schedule = schedules[transport.rank]
        self._final = final_sum(self._schedule)
        self._offsets = chunk_offsets(self._schedule, region)
        self._met = _meetings(schedules, transport.rank)

    def run(self) -> Iterator[Wait]:
        counters = self._counters
        counters.begin()
        for index, step in enumerate(self._schedule.steps):
            givers = [(move.peer, self._met[index, move.peer, True]) for move in step.recvs]
            takers = [(move.peer, self._met[index, move.peer, False]) for move in step.sends]
            counters.enter(index)
            yield counters.until(counters.ENTERED, givers)
            late = self._receive(step, self._divisor if index == self._final else 1)
            counters.leave(index)
            yield counters.until(counters.LEFT, takers)
            for target, value in late:
                self._device.copy(target, value)

    def _receive(self, step: Step, divisor: int) -> list[tuple[Array, Array]]:
        """Pull every chunk of the step; what peers still read is returned to be stored later."""
        late: list[tuple[Array, Array]] = []
        for part, peers in _by_part(step, self._offsets):
            own = self._region.array[part]
            sources = {who: self._region.peer(who)[part] for who in peers}
            if step.action is Action.COPY:
                (source,) = sources.values()
                self._device.copy(own, source)
                continue
            offered = any(
                self._offsets[move.lo] < part.stop and part.start < self._offsets[move.hi]
                for move in step.sends
            )
            target = np.empty_like(own) if offered else own
            sources[self._transport.rank] = own
            self._device.reduce(
                [target], [sources[who] for who in sorted(sources)], self._region.dtype, divisor
            )
            if offered:
                late.append((own, target))
        return late


def _by_part(step: Step, offsets: Sequence[int]) -> list[tuple[slice, list[int]]]:
    """The received element ranges of a step, each with the ranks that it comes from."""
    parts: dict[tuple[int, int], list[int]] = {}
    for move in step.recvs:
        parts.setdefault((offsets[move.lo], offsets[move.hi]), []).append(move.peer)
    return [(slice(*bounds), peers) for bounds, peers in parts.items() if bounds[0] < bounds[1]]


def _meetings(schedules: Sequence[Schedule], rank: int) -> dict[tuple[int, int, bool], int]:
    """At which of its steps each peer takes its side of this rank's transfers.

    Keys are (own step, peer, whether this rank receives); transfers between two ranks meet in
    order, first with first.
    """
    met: dict[tuple[int, int, bool], int] = {}
    own = schedules[rank].steps
    peers = {move.peer for step in own for move in (*step.sends, *step.recvs)}
    for peer in peers:
        for receives in (True, False):
            mine = [
                index
                for index, step in enumerate(own)
                for move in (step.recvs if receives else step.sends)
                if move.peer == peer
            ]
            theirs = [
                index
                for index, step in enumerate(schedules[peer].steps)
                for move in (step.sends if receives else step.recvs)
                if move.peer == rank
            ]
            for here, there in zip(mine, theirs, strict=True):
                met[here, peer, receives] = there
    return met
