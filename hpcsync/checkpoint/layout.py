"""Which bytes of which tensor each writer stores: a pure function of shapes and their number.

All tensors stand in one row, in the order given, and the row is cut into as many stretches of
equal bytes as there are writers. A cut is moved to the nearest row of the tensor it falls into: an
index of its first dimension longer than 1. So each byte is stored once, a tensor is in few pieces,
and no writer has more than about a row above its share.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from ..errors import CheckpointError

# Bytes of an element, by the dtype's name in torch.
SIZES = {
    name: size
    for size, names in {
        1: "bool uint8 int8 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
        "float8_e8m0fnu",
        2: "uint16 int16 float16 bfloat16",
        4: "uint32 int32 float32",
        8: "uint64 int64 float64 complex64",
        16: "complex128",
    }.items()
    for name in names.split()
}
# What NumPy and HDF5 have no name for is stored as integers of the same bits.
STORED_AS = {
    name: f"uint{8 * size}"
    for name, size in SIZES.items()
    if name == "bfloat16" or name.startswith("float8")
}
MAX_DIMS = 32  # of HDF5


class TensorMeta(NamedTuple):
    """A tensor without its values: dtype by torch's name, a key of ``SIZES``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def axis(self) -> int:
        """The dimension that is cut: the first longer than 1; 0 if there is none."""
        return next((axis for axis, size in enumerate(self.shape) if size > 1), 0)

    @property
    def rows(self) -> int:
        """Size along ``axis``; 1 for a tensor of no dimension."""
        return self.shape[self.axis] if self.shape else 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]

    @property
    def row_nbytes(self) -> int:
        return self.nbytes // max(self.rows, 1)

    def part(self, rows: int) -> tuple[int, ...]:
        """The shape of so many rows."""
        if not self.shape:
            return ()
        return (*self.shape[: self.axis], rows, *self.shape[self.axis + 1 :])


class Piece(NamedTuple):
    """Rows ``start`` to ``start + rows`` of a tensor, contiguous in it."""

    name: str
    start: int
    rows: int
    nbytes: int


class Dataset(NamedTuple):
    """A dataset of a file: rows of a tensor, from ``start`` on, that several may write.

    Attributes:
        meta: of the whole tensor.
    """

    meta: TensorMeta
    start: int
    rows: int

    @property
    def name(self) -> str:
        return self.meta.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.meta.part(self.rows)

    @property
    def nbytes(self) -> int:
        return self.rows * self.meta.row_nbytes


def whole(meta: TensorMeta) -> Piece:
    """A tensor in one piece."""
    return Piece(meta.name, 0, meta.rows, meta.nbytes)


def share(
    metas: Sequence[TensorMeta], writers: int, first_only: Collection[str] = ()
) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of each writer; tensors without elements have none.

    Args:
        metas: the tensors that all writers hold alike, in the same order everywhere.
        first_only: names of those that the first writer stores; the others even that out.
    """
    fixed = [meta for meta in metas if meta.name in first_only and meta.nbytes]
    cut = [meta for meta in metas if meta.name not in first_only and meta.nbytes]
    taken = sum(meta.nbytes for meta in fixed)
    bounds = _bounds(sum(meta.nbytes for meta in cut), writers, taken)
    stops = list(accumulate((meta.nbytes for meta in cut), initial=0))
    cuts = [_to_row(cut, stops, bound) for bound in bounds]
    found: list[list[Piece]] = [[] for _ in range(writers)]
    found[0] += [whole(meta) for meta in fixed]
    for writer in range(writers):
        low, high = cuts[writer], cuts[writer + 1]
        for index in range(max(bisect_right(stops, low) - 1, 0), len(cut)):
            if stops[index] >= high:
                break
            row = cut[index].row_nbytes
            start = max(low - stops[index], 0) // row
            stop = min(high - stops[index], cut[index].nbytes) // row
            if start < stop:
                rows = stop - start
                found[writer].append(Piece(cut[index].name, start, rows, rows * row))
    return tuple(map(tuple, found))


def datasets(metas: Sequence[TensorMeta], pieces: Iterable[Piece]) -> tuple[Dataset, ...]:
    """The datasets of a file that holds these pieces, each made of those that adjoin.

    Args:
        pieces: of all who write the file; those of one tensor follow on each other, as those of
            writers that do in ``share``.

    Raises:
        CheckpointError: two tensors have the same name, or pieces do not adjoin.
    """
    of = {meta.name: meta for meta in metas}
    if len(of) < len(metas):
        raise CheckpointError("checkpoint: two tensors have the same name")
    spans: dict[str, tuple[int, int, int]] = {}
    for piece in pieces:
        start, stop = piece.start, piece.start + piece.rows
        low, high, rows = spans.get(piece.name, (start, stop, 0))
        spans[piece.name] = min(low, start), max(high, stop), rows + piece.rows
    for name, (low, high, rows) in spans.items():
        if rows != high - low:
            raise CheckpointError(
                f"checkpoint: {name}: rows are missing between the pieces of one file"
            )
    return tuple(Dataset(of[name], low, rows) for name, (low, _, rows) in spans.items())


def _bounds(total: int, writers: int, taken: int) -> list[int]:
    """Where the shares of ``total`` bytes end if the first writer has ``taken`` besides."""
    even = (total + taken) / writers
    first = max(round(even) - taken, 0) if writers > 1 else total
    rest = writers - 1
    return [0, *(first + (total - first) * index // max(rest, 1) for index in range(rest)), total]


def _to_row(metas: Sequence[TensorMeta], stops: Sequence[int], at: int) -> int:
    """The beginning of a row that is nearest to a byte."""
    index = bisect_right(stops, at) - 1
    if index >= len(metas):
        return at
    row = metas[index].row_nbytes
    return stops[index] + (at - stops[index] + row // 2) // row * row
