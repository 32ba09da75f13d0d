"""Ranks of one node read and write each other's memory; nothing is sent.

Every rank puts its buffer into a POSIX shared-memory file (mode 0600) which all ranks of the
node map and which has no name any more once they have: a killed job leaves nothing behind.

Two counters a rank and program order the accesses (``counters``). Sums are pulled by the rank that
owns them, results are pushed into the others' memory:

    step     rank 0                        rank 1
    enter    entered[0] = s                entered[1] = s
    work     add rank 1's chunk to mine    add rank 0's chunk to mine
    leave    left[0] = s                   left[1] = s
    wait for left of those I touched, or that touched me
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..device.base import Arithmetic, Array
from ..schedules.base import Action, Kind, Schedule, Step
from .base import Buffer, Program, Region, Transport, Wait, chunk_offsets, final_sum
from .counters import Counters, Slots, header
from .mapped import Gather, SharedMemoryError, share
from .meetings import by_part, meetings, offered

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

__all__ = ["SharedBuffer", "SharedMemory", "SharedMemoryError"]


class SharedBuffer(Buffer):
    """A buffer that every rank of the node has mapped.

    Attributes:
        slots: the counters of programs.
    """

    def __init__(self, maps: Sequence[mmap.mmap], rank: int, nbytes: int, counters: int) -> None:
        self._peers = [np.frombuffer(each, np.uint8, nbytes, counters) for each in maps]
        self.slots = Slots(maps, counters)
        super().__init__(self._peers[rank])

    @property
    def shared(self) -> bool:
        return True

    def peer(self, index: int) -> Array:
        return self._peers[index]


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
        device: Arithmetic,
        wait: Callable[[Request], None] | None = None,
    ) -> None:
        super().__init__(ranks, comm.Get_rank())
        self.device = device
        self._gather = Gather(comm, wait)

    def allocate(self, nbytes: int, slots: int) -> SharedBuffer:
        """A zeroed buffer of ``nbytes`` on every rank of the node, with counters for ``slots``
        programs; collective over the node.

        Raises:
            SharedMemoryError: on every rank of the node, if one of them found no room.
        """
        counters = header(slots)
        maps = share(self._gather, counters + max(nbytes, 1))
        return SharedBuffer(maps, self.rank, nbytes, counters)

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
        schedule = schedules[self.rank]
        assert schedule.name != "native", "native is MPI's own"
        counters = Counters(buffer.slots, self.name, self.ranks, self.rank)
        if schedule.name == "direct":
            return _Direct(self, counters, schedule, region, divisor, released)
        return _Stepwise(self, counters, schedules, region, divisor)


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
        counters: Counters,
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
        counters: Counters,
        schedules: Sequence[Schedule],
        region: Region,
        divisor: int,
    ) -> None:
        self._transport = transport
        self._device: Arithmetic = transport.device
        self._counters = counters
        self._region = region
        self._divisor = divisor
        self._schedule = schedules[transport.rank]
        self._final = final_sum(self._schedule)
        self._offsets = chunk_offsets(self._schedule, region)
        self._met = meetings(schedules, transport.rank)

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
        for part, peers in by_part(step, self._offsets):
            own = self._region.array[part]
            sources = {who: self._region.peer(who)[part] for who in peers}
            if step.action is Action.COPY:
                (source,) = sources.values()
                self._device.copy(own, source)
                continue
            kept = offered(step, self._offsets, part)
            target = np.empty_like(own) if kept else own
            sources[self._transport.rank] = own
            self._device.reduce(
                [target], [sources[who] for who in sorted(sources)], self._region.dtype, divisor
            )
            if kept:
                late.append((own, target))
        return late
