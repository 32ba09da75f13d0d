"""Messages of varying length between device parcels, by way of pinned host memory.

A parcel goes in pieces; the first begins with the length of the whole, so that the receiver knows
how many follow. Pieces of one parcel are received before the first of the next from that rank,
since MPI matches messages in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..device import Event, Stream
from ..device.base import Array
from .base import Mail, Parcel, Wait
from .staging import Lanes, Piece

if TYPE_CHECKING:
    from mpi4py.MPI import Request

_HEAD = 8  # bytes of the length
_WINDOW = 8  # pieces that are on the way at once, to a mail's ranks together or from one of them


@dataclass(slots=True)
class _Message:
    """A piece between MPI and a device; ``missing`` is 1 until MPI has completed it."""

    peer: int
    piece: Piece
    event: Event | None = None
    request: Request | None = None
    missing: int = 1


@dataclass(slots=True)
class _Outgoing:
    """A parcel that is sent.

    Attributes:
        event: after which it may be read.
        at: bytes that were copied down.
    """

    peer: int
    memory: Array
    event: Event
    at: int = 0
    started: bool = False
    messages: deque[_Message] = field(default_factory=deque)

    @property
    def over(self) -> bool:
        return self.started and self.at == self.memory.shape[0] and not self.messages


@dataclass(slots=True)
class _Incoming:
    """A parcel that is received.

    Attributes:
        event: after which it may be written.
        posted: bytes for which receives are posted.
        stored: bytes that were copied up.
        total: its length; -1 until that has come.
    """

    peer: int
    memory: Array
    event: Event
    posted: int = 0
    stored: int = 0
    total: int = -1
    messages: deque[_Message] = field(default_factory=deque)

    @property
    def over(self) -> bool:
        return self.total >= 0 and self.stored >= self.total and not self.messages


class _Until(Wait):
    """Until all of some parcels have been sent, or given to the device."""

    __slots__ = ("_mail", "_what", "_which")

    def __init__(
        self, mail: StagedMail, which: Sequence[_Outgoing] | Sequence[_Incoming], what: str
    ) -> None:
        self._mail, self._which, self._what = mail, which, what

    def ready(self) -> bool:
        self._mail.move()
        return all(each.over for each in self._which)

    def describe(self) -> str:
        ranks = sorted({self._mail.lanes.ranks[each.peer] for each in self._which if not each.over})
        named = ", ".join(map(str, ranks)) or "none"
        return f"mpi_staged: waits for coded messages {self._what} rank {named}"


class StagedMail(Mail):
    """Messages between parcels in the memory of a device.

    Args:
        stream: that makes and reads what the parcels hold.
    """

    def __init__(
        self,
        lanes: Lanes,
        sends: Sequence[Parcel],
        receives: Sequence[Parcel],
        tag: int,
        stream: Stream,
    ) -> None:
        self.lanes, self._tag, self._stream, self._size = lanes, tag, stream, lanes.piece_bytes
        self._sends, self._receives = sends, receives
        self._going: deque[_Outgoing] = deque()
        self._coming: dict[int, deque[_Incoming]] = {}

    def expect(self, which: Sequence[int]) -> Wait:
        event = self._stream.record()
        parcels = [self._receives[index] for index in which]
        made = [_Incoming(each.peer, each.memory, event) for each in parcels]
        for each in made:
            self._coming.setdefault(each.peer, deque()).append(each)
        self.move()
        return _Until(self, made, "from")

    def send(self, which: int, nbytes: int) -> Wait:
        parcel = self._sends[which]
        going = _Outgoing(parcel.peer, parcel.memory[:nbytes], self._stream.record())
        self._going.append(going)
        self.move()
        return _Until(self, [going], "to")

    def close(self) -> None:
        pass

    def move(self) -> None:
        """Go on with all parcels as far as possible."""
        self.lanes.completions.poll()
        for queue in self._coming.values():
            for each in queue:
                self._store(each)
            while queue and queue[0].over:
                queue.popleft()
            self._post(queue)
        held: set[int] = set()  # ranks to which something earlier is not posted yet
        for going in self._going:
            if going.peer not in held and not self._push(going):
                held.add(going.peer)
        while self._going and self._going[0].over:
            self._going.popleft()

    # ---- receiving -----------------------------------------------------------------------------

    def _post(self, queue: deque[_Incoming]) -> None:
        """Post the receives of the first parcel that wants some, and no later ones."""
        for each in queue:
            if not each.messages and each.total < 0:
                self._receive(each, _HEAD + min(self._size, each.memory.shape[0]))
                return
            if each.total < 0:
                return
            while each.posted < each.total and len(each.messages) < _WINDOW:
                size = min(self._size, each.total - each.posted)
                each.posted += size
                self._receive(each, size)
            if each.posted < each.total:
                return

    def _receive(self, each: _Incoming, nbytes: int) -> None:
        lanes = self.lanes
        message = _Message(each.peer, lanes.pinned.take(nbytes))
        message.request = lanes.comm.Irecv([message.piece.memory, lanes.byte], each.peer, self._tag)
        lanes.completions.watch([message.request], message)
        each.messages.append(message)

    def _store(self, each: _Incoming) -> None:
        """Copy up what has come of a parcel."""
        while each.messages and not each.messages[0].missing:
            piece = each.messages.popleft().piece
            data = piece.memory
            if each.total < 0:
                each.total = int(data[:_HEAD].view(np.uint64)[0])
                assert each.total <= each.memory.shape[0], "a message is longer than its room"
                each.posted = min(self._size, each.total)
                data = data[_HEAD : _HEAD + each.posted]
            event = None
            if data.shape[0]:
                event = self._lift(each, data)
            self.lanes.pinned.give(piece, event)

    def _lift(self, each: _Incoming, data: Array) -> Event:
        up = self.lanes.up
        up.wait(each.event)
        stop = each.stored + data.shape[0]
        up.copy(each.memory[each.stored : stop], data)
        each.stored = stop
        event = up.record()
        if stop == each.total:
            self._stream.wait(event)
        return event

    # ---- sending -------------------------------------------------------------------------------

    def _push(self, each: _Outgoing) -> bool:
        """Go on with a parcel; True if MPI has been given all of it."""
        lanes, messages = self.lanes, each.messages
        while messages and messages[0].request is not None and not messages[0].missing:
            lanes.pinned.give(messages.popleft().piece)
        while len(messages) < _WINDOW and (each.at < each.memory.shape[0] or not each.started):
            messages.append(self._lower(each))
        for message in messages:
            if message.request is not None:
                continue
            if message.event is not None and not message.event.ready():
                return False
            message.request = lanes.comm.Isend(
                [message.piece.memory, lanes.byte], each.peer, self._tag
            )
            lanes.completions.watch([message.request], message)
        return each.at == each.memory.nbytes

    def _lower(self, each: _Outgoing) -> _Message:
        """Copy the next piece down."""
        lanes = self.lanes
        head = 0 if each.started else _HEAD
        size = min(self._size, each.memory.shape[0] - each.at)
        piece = lanes.pinned.take(head + size)
        if head:
            piece.memory[:_HEAD].view(np.uint64)[0] = each.memory.shape[0]
        each.started = True
        if not size:
            return _Message(each.peer, piece)
        lanes.down.wait(each.event)
        lanes.down.copy(piece.memory[head:], each.memory[each.at : each.at + size])
        each.at += size
        return _Message(each.peer, piece, lanes.down.record())
