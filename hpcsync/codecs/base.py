"""The contract of a codec: how a flat piece of float32 gradient becomes bytes, and back.

A codec knows bytes, not networks. There are two kinds, by what may be done with the coded form:

    PieceCodec   any lossy one. A sum goes by the two-pass exchange: every rank codes each part
                 for the part's owner, the owner decodes, adds in rank order in FP32, codes the
                 sum, and hands it to all. Two codings, whatever the number of ranks.
    SumCodec     coded forms can be added: an ordinary allreduce adds them, in one round or more.

What a codec must remember from step to step (the error that coding made, a warm start) is in a
Store, one for each piece. A store's fields have one value an element of the piece, so that they
can be kept by parameter and moved when buckets are laid out anew.

NaN and Inf: coding any piece that holds one gives a piece that decodes to at least one NaN or
Inf, and leaves the store without either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device import cpu

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SENDER, OWNER = "sender", "owner"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a codec may be told; of the deck's ``compress`` section.

    Attributes:
        error_feedback: remember what coding lost, and add it to the next step.
        stochastic: round up or down at random, without bias, instead of to the nearest.
        seed: of all that is random.
        ratio: share of the elements that top-k and random-k send.
        threshold: magnitude from which threshold sends an element.
        rank: of PowerSGD's factors.
        momentum: of DGC's momentum correction; 0 for none.
        ratio_warmup: steps in which DGC's share falls from a quarter to ``ratio``.
        verify: check integer sums by a modular checksum.
        options: for codecs of the user's own.
    """

    error_feedback: bool = True
    stochastic: bool = False
    seed: int = 0
    ratio: float = 0.01
    threshold: float = 1e-3
    rank: int = 4
    momentum: float = 0.0
    ratio_warmup: int = 0
    verify: bool = False
    options: Mapping[str, Any] | None = None


class Store:
    """What a codec remembers of one piece: float32 fields of one value an element, zero at first.

    Subclasses may hold them otherwise (in 8 bits, rotated): ``read`` after ``write`` must give the
    same values, and a store written with what another one of the same length read must then act
    alike bit for bit.
    """

    def __init__(self, count: int, fields: Sequence[str]) -> None:
        self.count = count
        self.arrays: dict[str, Any] = {field: np.zeros(count, np.float32) for field in fields}

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    @property
    def nbytes(self) -> int:
        return sum(int(each.nbytes) for each in self.arrays.values())

    def read(self, field: str) -> Floats:
        """The field's values, ``count`` of them; may be the array itself."""
        values: Floats = self.arrays[field]
        return values

    def memory(self) -> Mapping[str, NDArray[Any]]:
        """Arrays that hold all there is, to be saved and set byte by byte; none if only ``read``
        and ``write`` tell."""
        return self.arrays if type(self).read is Store.read else {}

    def write(self, field: str, values: Floats) -> None:
        """Set the field to ``count`` values."""
        self.arrays[field][:] = values


@dataclass(frozen=True, slots=True)
class Moment:
    """When and where a piece is coded: what randomness and schedules depend on.

    Attributes:
        step: steps with this codec so far, the same on all ranks.
        seed: 64 bits, mixed from run, step, rank and piece: no two codings share it.
        shared_seed: 64 bits, mixed from run, step and piece only: the same on all ranks.
    """

    step: int = 0
    seed: int = 0
    shared_seed: int = 0


class Codec(ABC):
    """How pieces of gradient travel.

    Attributes:
        name: as ``compress.codec`` spells it.
        lossless: float32 survives it bit for bit.
        block: pieces are cut at multiples of so many elements where they can be.
    """

    name: str
    lossless = False
    block = 16

    def __init__(self, settings: Settings) -> None:
        self.settings = settings


class PieceCodec(Codec):
    """A codec whose pieces travel by the two-pass exchange."""

    @abstractmethod
    def capacity(self, count: int) -> int:
        """Most bytes that a piece of ``count`` elements takes when coded."""

    @property
    def fixed(self) -> bool:
        """Whether every coded piece has exactly ``capacity`` bytes."""
        return True

    def expected(self, count: int) -> float:
        """Bytes that a coded piece usually takes; for predictions."""
        return float(self.capacity(count))

    def store(self, count: int, role: str) -> Store | None:
        """A fresh store for a piece; None if this codec remembers nothing.

        Args:
            role: ``sender`` for what a rank codes for another owner, ``owner`` for the sum that
                its owner codes for all.
        """
        return Store(count, ["error"]) if self.settings.error_feedback else None

    @abstractmethod
    def encode(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> int:
        """Code ``values`` (and what the store held back) into ``out``; the bytes used.

        ``values`` is left as it is. ``out`` has at least ``capacity`` bytes and is 64-byte aligned
        only by chance.
        """

    @abstractmethod
    def decode(self, data: Bytes, out: Floats) -> None:
        """Write all elements of a coded piece to ``out``.

        Args:
            data: the bytes that ``encode`` used, or more.
        """

    @abstractmethod
    def decode_add(self, data: Bytes, out: Floats) -> None:
        """Add all elements of a coded piece to ``out``."""

    def combine(
        self,
        own: Floats,
        place: int,
        others: Sequence[Bytes],
        divisor: int,
        out: Bytes,
        store: Store | None,
        moment: Moment,
    ) -> int:
        """The owner's part: add all ranks' pieces, code the sum, and keep what was coded.

        The sum starts with the first rank's values and adds the others' in rank order, each
        rounded to float32; then it is divided, and what the store held back is added.

        Args:
            own: this rank's values, not coded; overwritten with what ``out`` decodes to.
            place: how many of ``others`` come before ``own`` in rank order.
            others: the coded pieces of the other ranks, in rank order.
            divisor: of the sum.

        Returns:
            The bytes of ``out`` that were used.
        """
        total = own
        if place:
            total = np.empty_like(own)
            self.decode(others[0], total)
            for data in others[1:place]:
                self.decode_add(data, total)
            np.add(total, own, out=total)
        for data in others[place:]:
            self.decode_add(data, total)
        if divisor != 1:
            divide(total, divisor)
        used = self.encode(total, out, store, moment)
        self.decode(out[:used], own)
        return used


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor of a piece: its first element there, and its shape."""

    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """An array that one round adds over all ranks.

    Attributes:
        dtype: NumPy name; integers are added without overflow by agreement.
        op: ``sum`` or ``max`` (max for int32 only).
    """

    dtype: str
    count: int
    op: str = "sum"


class SumCodec(Codec):
    """A codec whose coded forms are added by an ordinary allreduce.

    Attributes:
        whole: pieces hold whole tensors, and ``matrices`` tells their shapes.
        replays: the sums, the shared seed and the step alone determine what is decoded, not what
            the store holds; a replay log keeps the sums then, and else what was decoded.
    """

    whole = False
    replays = False

    @abstractmethod
    def forms(self, count: int, matrices: Sequence[Matrix], ranks: int) -> tuple[Form, ...]:
        """The rounds of a piece of ``count`` elements, in order, over ``ranks`` ranks."""

    def store(self, count: int, matrices: Sequence[Matrix]) -> Store | None:
        """A fresh store for a piece; None if this codec remembers nothing."""
        return Store(count, ["error"]) if self.settings.error_feedback else None

    @abstractmethod
    def rounds(
        self,
        values: Floats,
        arrays: Sequence[NDArray[Any]],
        matrices: Sequence[Matrix],
        ranks: int,
        divisor: int,
        store: Store | None,
        moment: Moment,
    ) -> Iterator[int]:
        """One exchange, as a coroutine.

        It fills ``arrays[i]`` (the memory of form i) and yields i; when it is resumed, that array
        holds the sum (or maximum) over all ranks, the same bits on each. In the end ``values``
        hold the decoded sum over ranks, divided by ``divisor``.
        """


def divide(values: Floats, divisor: int) -> None:
    """Divide in place, to the bits of the device's own means."""
    cpu.divide(values, divisor, values)
