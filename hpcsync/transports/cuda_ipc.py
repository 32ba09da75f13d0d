"""Ranks of one node read and write each other's device memory; nothing is sent.

Every rank's memory is opened by all the others, and so are events (``ipc_order``): once the streams
have waited for each other, one kernel adds from all memories.

large   each rank owns a chunk: one kernel adds it from all memories and writes it to all
small   each rank adds everything for itself, out of copies, and so they meet once, not twice:
        there are two copies in turn, and who has come to the next run has read those of this one

Both add in rank order, so their bits are the same. Other schedules go step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..device import Device, Event
from ..device.base import Array
from ..schedules.base import Action, Kind, Schedule, Step
from .base import Program, Region, Transport, Wait, chunk_offsets, final_sum
from .ipc_memory import IpcBuffer, Memories, aligned, room
from .ipc_order import Order
from .mapped import Gather
from .meetings import by_part, meetings, offered

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

ONE_SHOT = 1 << 20  # bytes that a rank reads from its peers at most, for small sums; not measured


def copies(nbytes: int, ranks: int) -> int:
    """Bytes that a buffer of ``nbytes`` takes beside those, on a node of so many ranks."""
    return room(nbytes, _small(ONE_SHOT, ranks))


def _small(one_shot: int, ranks: int) -> int:
    """Bytes of the largest sum that is made in one go."""
    return one_shot // (ranks - 1) if ranks > 1 else 0


class CudaIpc(Transport):
    """Direct access between the devices of a node's ranks.

    Args:
        comm: the node's communicator; used for setting up only.
        device: of this rank.
        one_shot: bytes that a rank reads from its peers at most, where all add everything;
            ``ONE_SHOT`` if not given.
    """

    name = "cuda_ipc"

    def __init__(
        self,
        comm: Intracomm,
        ranks: Sequence[int],
        device: Device,
        wait: Callable[[Request], None] | None = None,
        one_shot: int | None = None,
    ) -> None:
        super().__init__(ranks, comm.Get_rank())
        self.device = device
        self._small = _small(ONE_SHOT if one_shot is None else one_shot, self.size)
        self.memories = Memories(device, Gather(comm, wait), self.ranks, self.rank)

    def allocate(self, nbytes: int, slots: int) -> IpcBuffer:
        """A zeroed buffer of ``nbytes`` on every rank of the node, with counters for ``slots``
        programs; collective over the node.

        Raises:
            DeviceError: on every rank of the node, if one of them has no room or cannot reach
                another's memory.
        """
        return self.memories.make(nbytes, slots, self._small)

    def close(self, *, orderly: bool) -> bool:
        return self.memories.close(orderly=orderly)

    def bind(
        self,
        schedules: Sequence[Schedule],
        region: Region,
        tag: int,
        divisor: int = 1,
        released: bool = False,
    ) -> Program:
        buffer = region.buffer
        assert isinstance(buffer, IpcBuffer), "cuda_ipc needs a buffer of its own"
        schedule = schedules[self.rank]
        assert schedule.name != "native", "native is MPI's own"
        if not buffer.bound:
            buffer.bound = True
            self.memories.release()
        order = Order(self, self.memories.signals, buffer, region)
        if schedule.name != "direct":
            return _Stepwise(self, order, schedules, region, divisor)
        everybody = schedule.kind is Kind.ALLREDUCE and schedule.chunks == self.size
        if everybody and region.nbytes <= self._small:
            nbytes = aligned(region.nbytes)
            if (taken := buffer.copies.take(2 * nbytes)) is not None:
                return _OneShot(self, order, buffer, region, divisor, *taken)
        return _Direct(self, order, schedule, region, divisor, released)


class _Direct(Program):
    """The direct schedule: each owner adds its chunk from all memories, and writes it to all.

    A chunk is touched by nobody but its owner from the moment everyone has entered until the
    owner has left. So an allgather that follows the reduce-scatter need not wait for the others to
    enter.
    """

    def __init__(
        self,
        transport: CudaIpc,
        order: Order,
        schedule: Schedule,
        region: Region,
        divisor: int,
        released: bool,
    ) -> None:
        self._order = order
        self._released = released
        self._dtype = region.dtype
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
        self._mine = self._views[transport.rank]

    def run(self) -> Iterator[Wait]:
        order = self._order
        order.begin()
        order.enter(0)
        if not self._released:
            yield from order.entered((who, 0) for who in order.others)
        if self._mine.shape[0]:
            self._work()
        if self._kind is not Kind.REDUCE_SCATTER:
            order.leave(0)
            yield from order.left((who, 0) for who in order.others)

    def close(self) -> None:
        self._order.close()

    def _work(self) -> None:
        stream = self._order.stream
        theirs = [self._views[who] for who in self._order.others]
        if self._kind is Kind.ALLGATHER:
            for view in theirs:
                stream.copy(view, self._mine)
            return
        outs = [self._mine, *theirs] if self._kind is Kind.ALLREDUCE else [self._mine]
        stream.reduce(outs, self._views, self._dtype, self._divisor)


class _OneShot(Program):
    """Each rank adds the whole region for itself, from its own memory and copies of the others'.

    Args:
        start: of the copies in the buffer's room for them.
        after: what has used the room before.
    """

    def __init__(
        self,
        transport: CudaIpc,
        order: Order,
        buffer: IpcBuffer,
        region: Region,
        divisor: int,
        start: int,
        after: Event | None,
    ) -> None:
        self._order = order
        self._dtype = region.dtype
        self._divisor = divisor
        self._own = region.array
        self._rank = transport.rank
        self._after = after
        self._runs = 0
        self._taken = buffer, start, 2 * aligned(region.nbytes)
        self._copies = [
            [
                buffer.block(who, start + turn * aligned(region.nbytes), region.nbytes).view(
                    region.dtype.storage
                )
                for who in range(transport.size)
            ]
            for turn in range(2)
        ]

    def run(self) -> Iterator[Wait]:
        order, copies = self._order, self._copies[self._runs % 2]
        self._runs += 1
        order.begin()
        if self._after is not None:
            # Others may still read what another program has left in the room.
            order.stream.wait(self._after)
            self._after = None
            order.enter(0)
            yield from order.entered((who, 0) for who in order.others)
        if self._own.shape[0]:
            order.stream.copy(copies[self._rank], self._own)
        order.enter(1)
        yield from order.entered((who, 1) for who in order.others)
        if self._own.shape[0]:
            sources = [*copies]
            sources[self._rank] = self._own
            order.stream.reduce([self._own], sources, self._dtype, self._divisor)

    def close(self) -> None:
        buffer, start, nbytes = self._taken
        if self._after is not None:  # it has never run, and who comes next waits for this stream
            self._order.stream.wait(self._after)
        buffer.copies.give(start, nbytes, self._order.stream)
        self._order.close()


class _Stepwise(Program):
    """Any other schedule, step by step, by pulling."""

    def __init__(
        self,
        transport: CudaIpc,
        order: Order,
        schedules: Sequence[Schedule],
        region: Region,
        divisor: int,
    ) -> None:
        self._rank = transport.rank
        self._order = order
        self._region = region
        self._divisor = divisor
        self._schedule = schedules[transport.rank]
        self._final = final_sum(self._schedule)
        self._offsets = chunk_offsets(self._schedule, region)
        self._met = meetings(schedules, transport.rank)
        self._kept = transport.device.empty(self._kept_bytes())

    def run(self) -> Iterator[Wait]:
        order = self._order
        order.begin()
        for index, step in enumerate(self._schedule.steps):
            givers = [(move.peer, self._met[index, move.peer, True]) for move in step.recvs]
            takers = [(move.peer, self._met[index, move.peer, False]) for move in step.sends]
            order.enter(index)
            yield from order.entered(givers)
            late = self._receive(step, self._divisor if index == self._final else 1)
            order.leave(index)
            yield from order.left(takers)
            for target, value in late:
                order.stream.copy(target, value)

    def close(self) -> None:
        self._order.close()

    def _kept_bytes(self) -> int:
        """Room for the sums of a step that peers still read the addends of."""
        elements = max(
            (
                sum(
                    part.stop - part.start
                    for part, _ in by_part(step, self._offsets)
                    if offered(step, self._offsets, part)
                )
                for step in self._schedule.steps
                if step.action is Action.REDUCE
            ),
            default=0,
        )
        return elements * self._region.dtype.itemsize

    def _receive(self, step: Step, divisor: int) -> list[tuple[Array, Array]]:
        """Pull every chunk of the step; what peers still read is returned to be stored later."""
        late: list[tuple[Array, Array]] = []
        region, stream = self._region, self._order.stream
        kept = self._kept.view(region.dtype.storage)
        for part, peers in by_part(step, self._offsets):
            own = region.array[part]
            sources = {who: region.peer(who)[part] for who in peers}
            if step.action is Action.COPY:
                (source,) = sources.values()
                stream.copy(own, source)
                continue
            target = own
            if offered(step, self._offsets, part):
                target, kept = kept[: own.shape[0]], kept[own.shape[0] :]
                late.append((own, target))
            sources[self._rank] = own
            ordered = [sources[who] for who in sorted(sources)]
            stream.reduce([target], ordered, region.dtype, divisor)
        return late
