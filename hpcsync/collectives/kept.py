"""What a rank keeps of a mean so that it can be had again without the gradients it came from.

Each element of a mean is some rank's to keep, in the form in which it was sent:

    MEAN    the two-pass exchange: the owner's coded mean, as it went to all others
    SUMS    a sum of coded forms: of each array that was added, one slice for each rank of the rail
    PLAIN   what is not coded, or by a codec whose sums do not tell the mean alone: the elements

All ranks' pieces together decode to the mean's own bits on any rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..codecs import Codec, Matrix, Moment, PieceCodec, SumCodec
from ..codecs.base import Bytes, Floats
from ..codecs.gpu.room import Room
from ..device import Stream, dtype_of
from ..device.base import Array
from ..device.kernels import empty_bytes
from ..errors import CheckpointError
from ..transports.base import Program, Region
from .tail import Tailed

MEAN, SUMS, PLAIN = "mean", "sums", "plain"


@dataclass(frozen=True, slots=True)
class Kept:
    """A piece that a rank keeps: the same in each run.

    Attributes:
        kind: one of the above.
        start, count: elements of the allreduce that it decodes to.
        tail: last of them that were not coded.
        share, shares: which slice of the sums this is, of how many.
        divisor: of the sums.
    """

    kind: str
    start: int
    count: int
    tail: int = 0
    share: int = 0
    shares: int = 1
    divisor: int = 1


@dataclass(frozen=True, slots=True)
class Left:
    """A piece after one run.

    Attributes:
        arrays: its bytes; they may be changed by the next run.
        step, seed: ``Moment.step`` and ``Moment.shared_seed``.
    """

    arrays: tuple[Bytes, ...]
    step: int = 0
    seed: int = 0


class Keeper(Protocol):
    """Where a piece is to be had after each run."""

    @property
    def kept(self) -> Kept: ...

    def left(self) -> Left: ...


class CodedProgram(Program):
    """A program whose contents are coded."""

    @abstractmethod
    def keepers(self) -> list[Keeper]:
        """What this rank keeps, from the next run on; the same ones if asked again."""


class Plain:
    """A piece that is elements of a region as they are."""

    def __init__(self, region: Region, start: int, low: int, high: int) -> None:
        """Elements ``low`` to ``high`` of the region, which begins at ``start``."""
        self.kept = Kept(PLAIN, start + low, high - low)
        self._memory = region.part(low, high).array.view(np.uint8)
        self._stream = region.stream

    def left(self) -> Left:
        return Left((fetched(self._memory, self._stream),))


def fetched(memory: Array, stream: Stream | None) -> Bytes:
    """Bytes as the host reads them; of a device's memory a copy, when the stream has come there."""
    return memory if stream is None else Room(stream).down(memory)


def cut(count: int, share: int, shares: int) -> slice:
    """The part of ``count`` elements that is one of ``shares``."""
    return slice(count * share // shares, count * (share + 1) // shares)


def within(matrices: Iterable[Matrix], start: int, count: int) -> list[Matrix]:
    """The tensors that begin in ``count`` elements from ``start`` on, with starts in there."""
    return [
        Matrix(each.start - start, each.shape)
        for each in matrices
        if start <= each.start < start + count
    ]


def decode_mean(codec: PieceCodec, kept: Kept, data: Bytes, out: Floats) -> None:
    """Decode a MEAN.

    Raises:
        CheckpointError: it is of another length than such a piece can have.
    """
    whole = Tailed(codec, kept.tail) if kept.tail else codec
    room = whole.capacity(kept.count)
    if data.shape[0] > room or (codec.fixed and data.shape[0] != room):
        raise CheckpointError(
            f"a piece of {kept.count} elements has {data.shape[0]} bytes; {codec.name} makes {room}"
        )
    padded = empty_bytes(room)  # aligned; and no codec reads past what is there
    padded[: data.shape[0]] = data
    padded[data.shape[0] :] = 0
    with np.errstate(all="ignore"):  # NaN and Inf are passed on
        whole.decode(padded, out)


def decode_sums(
    codec: SumCodec,
    kept: Kept,
    matrices: Sequence[Matrix],
    slices: Sequence[Sequence[Bytes]],
    moment: Moment,
    out: Floats,
) -> None:
    """Decode SUMS.

    Args:
        matrices: the tensors of the piece.
        slices: what each rank of the rail keeps, in order: the bytes of a slice of each array.

    Raises:
        CheckpointError: they are of other lengths than the codec's arrays.
    """
    forms = codec.forms(kept.count, matrices, kept.shares)
    arrays, sums = [], []
    for index, form in enumerate(forms):
        storage = dtype_of(f"{form.dtype} max" if form.op == "max" else form.dtype).storage
        parts = [each[index] for each in slices if index < len(each)]
        told = np.concatenate(parts) if parts else np.empty(0, np.uint8)
        if told.shape[0] != form.count * np.dtype(storage).itemsize:
            raise CheckpointError(
                f"sums of {kept.count} elements have {told.shape[0]} bytes in round {index}; "
                f"{codec.name} makes {form.count} numbers of {form.dtype}"
            )
        sums.append(told.view(storage))
        arrays.append(np.zeros(form.count, storage))
    out.fill(0)
    store = codec.store(kept.count, matrices)
    rounds = codec.rounds(out, arrays, matrices, kept.shares, kept.divisor, store, moment)
    with np.errstate(all="ignore"):
        while (index := next(rounds, -1)) >= 0:
            arrays[index][:] = sums[index]


def replays(codec: Codec) -> bool:
    """Whether what the ranks keep in coded form gives the mean again."""
    return not isinstance(codec, SumCodec) or codec.replays
