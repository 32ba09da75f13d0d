"""MPI messages straight between the memory of devices, where MPI takes pointers to it.

Only messages: MPI's own sums on device memory are known to fail, and streams add. MPI knows no
streams, so the host waits for what earlier work makes before MPI may read or write memory. What
has come the device may read, as soon as MPI says that it is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..device import Device, Event, Stream
from ..device.base import Array
from ..schedules.base import Action, Schedule, Step
from .base import Done, Mail, Parcel, Program, Region, Wait
from .messages import PIECE_BYTES, Arrived, pieces
from .point_to_point import PointToPoint
from .staging import Piece, Pool
from .steps import Incoming, Steps

if TYPE_CHECKING:
    from mpi4py.MPI import Request


class MpiDevice(PointToPoint[Device]):
    """MPI between the memory of devices.

    Attributes:
        scratch: for what is to be added.
    """

    name = "mpi_device"

    def _prepare(self) -> None:
        self.scratch = Pool(self.device.empty)

    def _program(self, schedule: Schedule, region: Region, tag: int, divisor: int) -> Program:
        assert schedule.name != "native", "native adds host memory only"
        return _Messages(self, schedule, region, tag, divisor)

    def _mail(
        self,
        sends: Sequence[Parcel],
        receives: Sequence[Parcel],
        tag: int,
        stream: Stream | None,
    ) -> Mail:
        assert stream is not None, "mpi_device is for device memory"
        return _Mail(self, sends, receives, tag, stream)

    def receive(self, memory: Array, peer: int, tag: int) -> list[Request]:
        """Begin to receive into device memory that nothing works on."""
        cut = pieces(memory, self.piece_bytes, self.mpi.BYTE)
        return [self.comm.Irecv(piece, peer, tag) for piece in cut]

    def send(self, memory: Array, peer: int, tag: int) -> list[Request]:
        """Begin to send device memory that holds what is to be sent."""
        cut = pieces(memory, self.piece_bytes, self.mpi.BYTE)
        return [self.comm.Isend(piece, peer, tag) for piece in cut]


class _Messages(Steps):
    """The steps of a schedule as messages between devices."""

    def __init__(
        self, transport: MpiDevice, schedule: Schedule, region: Region, tag: int, divisor: int
    ) -> None:
        assert region.stream is not None, "mpi_device is for device memory"
        super().__init__(transport.rank, schedule, region, divisor)
        self._transport, self._stream, self._tag = transport, region.stream, tag
        self.completions = transport.completions

    def run(self) -> Iterator[Wait]:
        for index, step in enumerate(self._schedule.steps):
            came, scratch = self._room(step)
            sent = self._sent(step)
            if not came and not sent:
                continue
            made = self._stream.record()
            yield Done(made, f"what step {index} of {self._schedule.name} sends")
            requests: list[Request] = []
            for each in came:
                requests += self._transport.receive(each.memory, each.peer, self._tag)
            for peer, memory in sent:
                requests += self._transport.send(memory, peer, self._tag)
            yield Arrived(requests, index, self)
            if step.action is Action.REDUCE:
                self._add(came, scratch, index)

    def describe(self, step: int, requests: Sequence[Request]) -> str:
        """How many messages of ``step`` are missing."""
        missing = sum(not request.Get_status() for request in requests)
        moves = self._schedule.steps[step]
        peers = sorted({move.peer for move in (*moves.recvs, *moves.sends)})
        named = ", ".join(str(self._transport.ranks[peer]) for peer in peers)
        return (
            f"mpi_device: {self._schedule.name} waits at step {step} of "
            f"{len(self._schedule.steps)} for {missing} messages with ranks {named}"
        )

    def _room(self, step: Step) -> tuple[list[Incoming], list[Piece]]:
        """What the step receives: in scratch memory, which comes with it, if it is to be added."""
        received, scratch = self._received(step), list[Piece]()
        places = [self._array[part] for _, part in received]
        if step.action is Action.REDUCE:
            scratch = [self._transport.scratch.take(own.nbytes) for own in places]
            places = [piece.memory.view(self._array.dtype) for piece in scratch]
        came = [Incoming(*each, memory) for each, memory in zip(received, places, strict=True)]
        return came, scratch

    def _add(self, came: Sequence[Incoming], scratch: Sequence[Piece], step: int) -> None:
        self._reduce(came, self._stream, step)
        added = self._stream.record()
        for piece in scratch:
            self._transport.scratch.give(piece, added)


@dataclass(slots=True)
class _Letter:
    """A parcel on its way.

    Attributes:
        event: after which MPI may have its memory.
        missing: messages that MPI has not completed.
    """

    peer: int
    memory: Array
    event: Event
    receives: bool
    posted: bool = False
    missing: int = 0
    requests: list[Any] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.posted and not self.missing


class _Until(Wait):
    """Until parcels have arrived, or have been taken."""

    __slots__ = ("_letters", "_mail")

    def __init__(self, mail: _Mail, letters: Sequence[_Letter]) -> None:
        self._mail, self._letters = mail, letters

    def ready(self) -> bool:
        self._mail.move()
        return all(each.over for each in self._letters)

    def describe(self) -> str:
        missing = [each for each in self._letters if not each.over]
        if any(not each.posted for each in missing):
            return "mpi_device: the device has not made a coded message"
        words = [
            f"{'from' if each.receives else 'to'} rank {self._mail.transport.ranks[each.peer]}"
            for each in missing
        ]
        return f"mpi_device: waits for coded messages {', '.join(words) or 'of nobody'}"


class _Mail(Mail):
    """Messages whose length is known only when they are sent."""

    def __init__(
        self,
        transport: MpiDevice,
        sends: Sequence[Parcel],
        receives: Sequence[Parcel],
        tag: int,
        stream: Stream,
    ) -> None:
        assert all(each.memory.nbytes < PIECE_BYTES for each in (*sends, *receives))
        self.transport = transport
        self._sends, self._receives = sends, receives
        self._tag, self._stream = tag, stream
        self._letters: deque[_Letter] = deque()  # that MPI has not got yet, in order

    def expect(self, which: Sequence[int]) -> Wait:
        event = self._stream.record()
        parcels = [self._receives[index] for index in which]
        letters = [_Letter(each.peer, each.memory, event, receives=True) for each in parcels]
        self._letters.extend(letters)
        self.move()
        return _Until(self, letters)

    def send(self, which: int, nbytes: int) -> Wait:
        parcel = self._sends[which]
        event = self._stream.record()
        letter = _Letter(parcel.peer, parcel.memory[:nbytes], event, receives=False)
        self._letters.append(letter)
        self.move()
        return _Until(self, [letter])

    def close(self) -> None:
        pass

    def move(self) -> None:
        """Give MPI what the device has made, in the order in which it was asked for."""
        transport = self.transport
        while self._letters and self._letters[0].event.ready():
            letter = self._letters.popleft()
            comm = transport.comm
            begin = comm.Irecv if letter.receives else comm.Isend
            request = begin([letter.memory, transport.mpi.BYTE], letter.peer, self._tag)
            letter.requests, letter.posted, letter.missing = [request], True, 1
            transport.completions.watch([request], letter)
        transport.completions.poll()
