"""Pieces of the two-pass exchange: what all forms share, and those whose pieces have one size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...device import dtype_of
from ...device.base import Array
from ...device.cuda_launch import MOST_ARRAYS, Address, address_of
from ..base import Moment, PieceCodec, Store
from ..blocked import BlockedCodec
from ..int4 import Int4
from ..none import Uncoded
from ..onebit import OneBit
from .room import Length, QueuedStore, Room, array_of

FLOAT32 = dtype_of("float32")

Kind = TypeVar("Kind", bound=PieceCodec)
Sources = tuple[Address, int, Sequence[Address], int, float]


@dataclass(frozen=True, slots=True)
class Sum:
    """What an owner adds and codes; see ``PieceCodec.combine``."""

    own: Array
    place: int
    others: Sequence[Array]
    divisor: int
    out: Array
    store: Store | None
    moment: Moment

    @property
    def sources(self) -> Sources:
        """What kernels add: ``own``, its place, the others, elements, and the divisor."""
        others = [address_of(each) for each in self.others]
        return address_of(self.own), self.place, others, self.own.shape[0], float(self.divisor)


class QueuedPieces(ABC, Generic[Kind]):
    """A codec's form on a stream.

    Args:
        most: elements of a piece.
        ranks: that take part.

    Attributes:
        name: the codec's.
        fixed: whether every coded piece has exactly ``capacity`` bytes.
    """

    def __init__(self, codec: Kind, room: Room, most: int, ranks: int) -> None:
        self.name, self.fixed = codec.name, codec.fixed
        self._codec, self._room = codec, room
        self._stream, self._blocks = room.stream, room.kernels.blocks
        self._stochastic = codec.settings.stochastic
        self._total = room.empty(most if self._adds_apart(ranks) else 0, FLOAT32.storage)

    def _adds_apart(self, ranks: int) -> bool:
        """Whether the sum of an owner is made in memory of its own."""
        return ranks - 1 > MOST_ARRAYS

    def capacity(self, count: int) -> int:
        """As the codec's."""
        return self._codec.capacity(count)

    def expected(self, count: int) -> float:
        """As the codec's."""
        return self._codec.expected(count)

    def store(self, count: int, role: str) -> Store | None:
        """The codec's store in device memory."""
        if self._codec.store(0, role) is None:
            return None

        def make() -> Store:
            made = self._codec.store(count, role)
            assert made is not None
            return made

        return QueuedStore(make, self._room)

    @abstractmethod
    def encode(
        self, values: Array, out: Array, store: Store | None, moment: Moment
    ) -> int | Length:
        """As the codec's."""

    @abstractmethod
    def decode(self, data: Array, out: Array) -> None:
        """As the codec's."""

    @abstractmethod
    def decode_add(self, data: Array, out: Array) -> None:
        """As the codec's."""

    def combine(
        self,
        own: Array,
        place: int,
        others: Sequence[Array],
        divisor: int,
        out: Array,
        store: Store | None,
        moment: Moment,
    ) -> int | Length:
        """As the codec's."""
        return self._combine(Sum(own, place, others, divisor, out, store, moment))

    def _combine(self, given: Sum) -> int | Length:
        own, place = given.own, given.place
        total = self._total[: own.shape[0]]
        if place:
            self.decode(given.others[0], total)
            for data in given.others[1:place]:
                self.decode_add(data, total)
            self._stream.reduce([own], [total, own], FLOAT32)
        for data in given.others[place:]:
            self.decode_add(data, own)
        if given.divisor != 1:
            self._stream.reduce([own], [own], FLOAT32, given.divisor)
        used = self.encode(own, given.out, given.store, given.moment)
        self.decode(given.out, own)
        return used


class Plain(QueuedPieces[Uncoded]):
    """none."""

    def _adds_apart(self, ranks: int) -> bool:
        return True

    def encode(self, values: Array, out: Array, store: Store | None, moment: Moment) -> int:
        used = self.capacity(values.shape[0])
        if used:
            self._stream.copy(out[:used].view(values.dtype), values)
        return used

    def decode(self, data: Array, out: Array) -> None:
        if out.shape[0]:
            self._stream.copy(out, self._values(data, out))

    def decode_add(self, data: Array, out: Array) -> None:
        if out.shape[0]:
            self._stream.reduce([out], [out, self._values(data, out)], FLOAT32)

    def _values(self, data: Array, out: Array) -> Array:
        return data[: out.nbytes].view(out.dtype)


class _Kernels(QueuedPieces[Kind]):
    """What the kernels of all families are called alike for."""

    def decode(self, data: Array, out: Array) -> None:
        with self._stream:
            self._blocks.decode(self.name, address_of(data), out.shape[0], address_of(out))

    def decode_add(self, data: Array, out: Array) -> None:
        with self._stream:
            self._blocks.decode_add(self.name, address_of(data), out.shape[0], address_of(out))

    def _combine(self, given: Sum) -> int | Length:
        if len(given.others) > MOST_ARRAYS:
            return super()._combine(given)
        sources = given.sources
        with self._stream:
            self._add(sources, given)
        return self.capacity(given.own.shape[0])

    @abstractmethod
    def _add(self, sources: Sources, given: Sum) -> None:
        """``combine`` by one kernel."""


class Blocked(_Kernels[BlockedCodec]):
    """bf16, fp16, fp8 and int8."""

    def encode(self, values: Array, out: Array, store: Store | None, moment: Moment) -> int:
        count, error = values.shape[0], array_of(store, "error")
        drawn = (self._stochastic, moment.seed)
        with self._stream:
            self._blocks.encode(
                self.name, address_of(values), error, count, *drawn, address_of(out)
            )
        return self.capacity(count)

    def _add(self, sources: Sources, given: Sum) -> None:
        drawn = (self._stochastic, given.moment.seed)
        error = array_of(given.store, "error")
        self._blocks.combine(self.name, *sources, error, *drawn, address_of(given.out))


class RotatedInt4(_Kernels[Int4]):
    """int4."""

    def encode(self, values: Array, out: Array, store: Store | None, moment: Moment) -> int:
        count, drawn = values.shape[0], (self._stochastic, moment.seed)
        with self._stream:
            self._blocks.int4_encode(
                address_of(values), *self._held(store), count, *drawn, address_of(out)
            )
        return self.capacity(count)

    def _add(self, sources: Sources, given: Sum) -> None:
        held, drawn = self._held(given.store), (self._stochastic, given.moment.seed)
        self._blocks.int4_combine(*sources, *held, *drawn, address_of(given.out))

    def _held(self, store: Store | None) -> tuple[Address | None, Address | None, float]:
        return array_of(store, "errors"), array_of(store, "exponents"), self._codec.keep


class Signs(_Kernels[OneBit]):
    """onebit."""

    def encode(self, values: Array, out: Array, store: Store | None, moment: Moment) -> int:
        count, error = values.shape[0], array_of(store, "error")
        with self._stream:
            self._blocks.onebit_encode(address_of(values), error, count, address_of(out))
        return self.capacity(count)

    def _add(self, sources: Sources, given: Sum) -> None:
        error = array_of(given.store, "error")
        self._blocks.onebit_combine(*sources, error, address_of(given.out))
