"""The contract of a transport: run a schedule's steps on a region of memory.

A transport joins the ranks of one group (a node, a rail, or all ranks). Binding a schedule to
a region gives a Program, which can be run again and again. A run is a coroutine: it yields a
Wait wherever another rank has to act first, and whoever drives it resumes it once the Wait is
ready. Nothing in a run blocks, and nothing in it spins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..device import Device, DType, Stream
from ..device.base import Array, Event
from ..schedules.base import Action, Kind, Schedule, Step, chunk_bounds


class Wait(ABC):
    """Something that other ranks will bring about."""

    __slots__ = ()

    @abstractmethod
    def ready(self) -> bool:
        """True once it has come; cheap, and it moves the underlying communication on."""

    @abstractmethod
    def describe(self) -> str:
        """What is missing, for the report of a stuck collective: ``node: entered by rank 3``."""


class Done(Wait):
    """Until a device has come to an event.

    Args:
        what: the device does till then, in words.
    """

    __slots__ = ("_event", "_what")

    def __init__(self, event: Event, what: str) -> None:
        self._event, self._what = event, what

    def ready(self) -> bool:
        return self._event.ready()

    def describe(self) -> str:
        return f"the device has not done: {self._what}"


class Buffer:
    """A flat piece of this rank's memory that collectives work on.

    Attributes:
        own: this rank's bytes, 1-D uint8.
    """

    def __init__(self, own: Array) -> None:
        self.own = own

    @property
    def nbytes(self) -> int:
        return int(self.own.shape[0])

    @property
    def shared(self) -> bool:
        """True when the other ranks of the node see the same memory."""
        return False

    @property
    def queued(self) -> bool:
        """True for memory of a device, which only its streams touch."""
        return False

    def peer(self, index: int) -> Array:
        """The bytes of the node's rank ``index``; only for shared buffers."""
        raise TypeError("this buffer is private to its rank")


def private_buffer(nbytes: int) -> Buffer:
    """A buffer of ordinary memory, for ranks that do not share any."""
    return Buffer(np.zeros(nbytes, np.uint8))


class DeviceBuffer(Buffer):
    """Memory of a device that no other rank sees."""

    @property
    def queued(self) -> bool:
        return True


def device_buffer(device: Device, nbytes: int) -> DeviceBuffer:
    """Zeroed memory of a device whose work is queued; sleeps until it is there.

    Raises:
        DeviceError: there is not enough.
    """
    memory = device.empty(nbytes)
    stream = device.stream()
    stream.fill(memory, 0)
    stream.synchronize()
    return DeviceBuffer(memory)


@dataclass(frozen=True)
class Region:
    """``count`` elements of ``dtype`` from byte ``offset`` of a buffer on.

    Attributes:
        cuts: element offsets at which a schedule of ``len(cuts) - 1`` chunks must cut the region;
            empty for equal chunks.
        stream: that does all work on a region of a device; None on the host.
    """

    buffer: Buffer
    offset: int
    count: int
    dtype: DType
    cuts: tuple[int, ...] = ()
    stream: Stream | None = None

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def array(self) -> Array:
        """This rank's elements, 1-D of ``dtype.storage``."""
        return self._view(self.buffer.own)

    def peer(self, index: int) -> Array:
        """The same elements in the memory of the node's rank ``index``."""
        return self._view(self.buffer.peer(index))

    def part(self, start: int, stop: int) -> Region:
        """Elements ``start`` to ``stop`` of this region."""
        return Region(
            self.buffer,
            self.offset + start * self.dtype.itemsize,
            stop - start,
            self.dtype,
            stream=self.stream,
        )

    def _view(self, memory: Array) -> Array:
        return memory[self.offset : self.offset + self.nbytes].view(self.dtype.storage)


class Program(ABC):
    """A schedule bound to a region: the sums, divided by ``divisor``, end up in the region."""

    @abstractmethod
    def run(self) -> Iterator[Wait]:
        """One execution, as a coroutine; the previous one must have ended.

        Of a region of a device it ends when all work is given to the region's stream, in whose
        order it comes: after what was given before, and before what is given next.
        """

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Give back what the binding holds (requests, communicators)."""


@dataclass(frozen=True)
class Parcel:
    """Memory of one message, 1-D uint8, and the rank of the group at its other end."""

    peer: int
    memory: Array


class Mail(ABC):
    """Messages between ranks of a group whose lengths vary from run to run.

    Parcels in a device's memory are read and written in the order of the stream that ``mail`` was
    given: ``send`` takes what earlier work of the stream has made, and once the Wait of ``expect``
    is ready, later work of the stream finds what came.
    Messages between two ranks arrive in the order in which they were sent, and are taken in the
    order in which they were expected.
    """

    @abstractmethod
    def expect(self, which: Sequence[int]) -> Wait:
        """Begin to receive these of the parcels; each into its memory, at most."""

    @abstractmethod
    def send(self, which: int, nbytes: int) -> Wait:
        """Begin to send the first ``nbytes`` of a parcel, which must stay as they are till then."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held; nothing may be under way."""


class Transport(ABC):
    """A way between the ranks of one group.

    Attributes:
        name: as the deck spells it.
        ranks: the job-wide ranks of the group, by rank in the group; for messages.
        rank: this rank's index in the group.
    """

    name: str

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self.ranks = tuple(ranks)
        self.rank = rank

    @property
    def size(self) -> int:
        return len(self.ranks)

    @abstractmethod
    def bind(
        self,
        schedules: Sequence[Schedule],
        region: Region,
        tag: int,
        divisor: int = 1,
        released: bool = False,
    ) -> Program:
        """Prepare one run of ``schedules[self.rank]`` on ``region``.

        Args:
            schedules: the schedule of every rank of the group.
            region: of equal length and type on every rank.
            tag: a number that no other program of this transport has, the same on all ranks.
            divisor: by what completed sums are divided (the number of ranks, for a mean); for
                groups of several ranks.
            released: an allgather that always follows the reduce-scatter of the same owners on
                the same region: nobody reads what it overwrites any more.
        """

    def allocate(self, nbytes: int, slots: int) -> Buffer:
        """A zeroed buffer that the ranks of the group share, with room for ``slots`` programs at
        once; collective over the group."""
        raise NotImplementedError(f"{self.name} shares no memory")

    def close(self, *, orderly: bool) -> bool:
        """Give back what peers have of this rank, and this rank of them, at the job's end;
        collective, but a rank that has failed waits for nobody.

        Args:
            orderly: this rank has not failed, and all its programs are closed.

        Returns:
            Whether it was given back; the same on all ranks. If not, the communicator must stay.
        """
        return True

    def mail(
        self,
        sends: Sequence[Parcel],
        receives: Sequence[Parcel],
        tag: int,
        stream: Stream | None = None,
    ) -> Mail:
        """Prepare messages that a Program cannot describe.

        Args:
            tag: as in ``bind``.
            stream: that works on the parcels, where they are in a device's memory.
        """
        raise NotImplementedError(f"{self.name} has no messages")


def chunk_offsets(schedule: Schedule, region: Region) -> list[int]:
    """Element offset of each chunk of the schedule, aligned to cache lines."""
    if len(region.cuts) == schedule.chunks + 1:
        return list(region.cuts)
    return chunk_bounds(region.count, max(schedule.chunks, 1), max(1, 64 // region.dtype.itemsize))


def final_sum(schedule: Schedule) -> int | None:
    """The step at which this rank's sums become complete; None if it completes none.

    There a mean is divided, before its one rounding, and not after: float16 could have overflowed.
    What later steps pass on is complete, so nobody else need divide.
    """
    if schedule.kind is Kind.ALLGATHER:
        return None
    adds = (index for index, step in enumerate(schedule.steps) if _adds(step))
    return max(adds, default=None)


def _adds(step: Step) -> bool:
    return step.action is Action.REDUCE and bool(step.recvs)


def sent_bytes(schedule: Schedule, region: Region, peers: Collection[int]) -> int:
    """Bytes that this rank sends to ``peers`` of the group in one run."""
    if not peers:
        return 0
    offsets = chunk_offsets(schedule, region)
    wanted = set(peers)
    elements = sum(
        offsets[move.hi] - offsets[move.lo]
        for step in schedule.steps
        for move in step.sends
        if move.peer in wanted
    )
    return elements * region.dtype.itemsize
