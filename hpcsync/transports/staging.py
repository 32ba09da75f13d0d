"""Memory that comes and goes with messages: pinned on the host, scratch on a device."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..device import Device, Event, Stream
from ..device.base import Array
from .point_to_point import PointToPoint

_LEAST = 1 << 12  # bytes
_IDLE = 8  # pieces of a size that may stand about until the device is done with them


@dataclass(frozen=True, slots=True)
class Piece:
    """Memory of a pool.

    Attributes:
        memory: the bytes that were asked for, 1-D uint8.
        whole: all that there are.
    """

    memory: Array
    whole: Array


class Pool:
    """Pieces of memory by size; used by one thread at a time.

    Args:
        make: gives memory of so many bytes, 1-D uint8.
    """

    def __init__(self, make: Callable[[int], Array]) -> None:
        self._make = make
        self._idle: dict[int, deque[tuple[Array, Event | None]]] = {}

    def take(self, nbytes: int, stream: Stream | None = None) -> Piece:
        """Memory with any contents, that nothing works on any more.

        Args:
            stream: that alone will work on it; it may wait for what does so now.

        Raises:
            DeviceError: there is not enough.
        """
        room = max(_LEAST, 1 << max(nbytes - 1, 0).bit_length())
        idle = self._idle.setdefault(room, deque())
        if idle:
            whole, event = idle[0]
            free = event is None or event.ready()
            if free or (stream is not None and len(idle) >= _IDLE):
                if not free and stream is not None and event is not None:
                    stream.wait(event)
                idle.popleft()
                return Piece(whole[:nbytes], whole)
        whole = self._make(room)
        return Piece(whole[:nbytes], whole)

    def give(self, piece: Piece, event: Event | None = None) -> None:
        """Take a piece back; work on it ends with ``event``."""
        self._idle[piece.whole.nbytes].append((piece.whole, event))


class Turns:
    """Two pieces of memory that steps take in turn: one is filled while the other is added up.

    ``with`` it, since others may ask for larger ones meanwhile.

    Args:
        make: gives memory of so many bytes, 1-D uint8.
    """

    def __init__(self, make: Callable[[int], Array]) -> None:
        self._make = make
        self._pieces = [make(0), make(0)]
        self._free: list[Event | None] = [None, None]
        self._turn = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Turns:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def reserve(self, nbytes: int) -> None:
        """Have room for so many; sleeps until larger memory can take the place of what is there."""
        with self:
            for index, piece in enumerate(self._pieces):
                if piece.nbytes < nbytes:
                    if (event := self._free[index]) is not None:
                        event.synchronize()
                    self._pieces[index] = self._make(nbytes)

    def take(self, stream: Stream) -> Array:
        """The next piece, which the stream may fill from now on."""
        self._turn = 1 - self._turn
        if (event := self._free[self._turn]) is not None:
            stream.wait(event)
        return self._pieces[self._turn]

    def give(self, stream: Stream) -> None:
        """The stream has been given all work on the piece that was taken last."""
        self._free[self._turn] = stream.record()


class Lanes:
    """What all programs of a staged transport share.

    Attributes:
        comm: that messages go over.
        byte: ``MPI.BYTE``.
        ranks, rank, piece_bytes: the transport's.
        pinned, scratch: memory of the host, and of the device.
        down, up: streams that copy to the host, and to the device.
    """

    def __init__(self, way: PointToPoint[Device]) -> None:
        self.comm, self.byte, self.completions = way.comm, way.mpi.BYTE, way.completions
        self.ranks, self.rank, self.piece_bytes = way.ranks, way.rank, way.piece_bytes
        self._device = way.device
        self.down, self.up = way.device.copies()
        self.pinned, self.scratch = Pool(way.device.pinned), Pool(self._scratch)

    def _scratch(self, nbytes: int) -> Array:
        # Of the stream that writes it first: no other need wait for what is at work elsewhere.
        with self.up:
            return self._device.empty(nbytes)
