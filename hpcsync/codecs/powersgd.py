"""PowerSGD: each matrix of gradients travels as two thin factors, found by one power iteration.

With M the matrix of a rank's gradient and its error, and Q the right factor of the step before:

    round 0    P = sum over ranks of M Q          then P's columns are made orthonormal
    round 1    Q = sum over ranks of M^T P
    decoded    P Q^T, divided                     error = M - P (M^T P)^T, of each rank's own M

(Vogels, Karimireddy and Jaggi, "PowerSGD", NeurIPS 2019, algorithms 1 and 2.) Both products are
linear in M, so ordinary allreduces add them. Q starts each step orthonormal: the same span, hence
the same result as the paper's, with better conditioned sums. A column of Q that is zero (at the
start, or where gradients had a lower rank) is replaced by a random one, the same on all ranks:
left alone it would stay zero for good.

A tensor of more than two dimensions is seen as (shape[0], the rest). Tensors that gain little,
(rows + columns) x rank x 2 >= rows x columns, and all else in the piece, travel uncoded in round
0. Factors are kept as rows (rank x rows, rank x columns), so that each is contiguous.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device.kernels import Kernels
from .base import Floats, Form, Matrix, Moment, Settings, Store, SumCodec, divide
from .factors import Factors, NativeFactors
from .rounding import units

LARGE = 1e30  # far from overflow: M less a product of such numbers is finite if M is


def gains(rows: int, columns: int, rank: int) -> bool:
    """Whether factors of this rank take less than half of the matrix's bytes."""
    return (rows + columns) * rank * 2 < rows * columns


def check(rank: int, shapes: Sequence[Sequence[int]]) -> str:
    """One line for the user if no tensor of these shapes would be coded, else empty."""
    sizes = [_flat(shape) for shape in shapes]
    if not sizes or any(gains(*size, rank) for size in sizes):
        return ""
    best, (rows, columns) = max(
        ((rows * columns - 1) // (2 * (rows + columns)), (rows, columns)) for rows, columns in sizes
    )
    what = f"compress.rank = {rank}: too large for PowerSGD, which would code no parameter"
    if best < 1:
        return f"{what}, nor would any other: all are too small; use another compress.codec"
    return (
        f"{what}: the best one, {rows} x {columns}, takes a rank of at most {best}; "
        f"use compress.rank={best} or less"
    )


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix that travels as factors.

    Attributes:
        start: its first element in the piece.
        p: where its left factor begins among the floats of round 0.
        q: where its right factor begins among those of round 1.
    """

    start: int
    rows: int
    columns: int
    p: int
    q: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Layout:
    """What of a piece travels how.

    Attributes:
        uncoded: ranges of elements that travel as they are, at the head of round 0, in order.
        sizes: floats of round 0 and of round 1.
    """

    coded: tuple[Coded, ...]
    uncoded: tuple[tuple[int, int], ...]
    sizes: tuple[int, int]


def lay_out(count: int, matrices: Sequence[Matrix], rank: int) -> Layout:
    """How a piece of ``count`` elements travels."""
    flat = [(each.start, *_flat(each.shape)) for each in matrices]
    wanted = sorted((s, rows, columns) for s, rows, columns in flat if gains(rows, columns, rank))
    uncoded, end = [], 0
    for start, rows, columns in wanted:
        if end < start:
            uncoded.append((end, start))
        end = start + rows * columns
    if end < count:
        uncoded.append((end, count))
    p, q, coded = sum(high - low for low, high in uncoded), 0, []
    for start, rows, columns in wanted:
        coded.append(Coded(start, rows, columns, p, q))
        p, q = p + rank * rows, q + rank * columns
    return Layout(tuple(coded), tuple(uncoded), (p, q))


class FactorStore(Store):
    """The error, and each coded matrix's Q at the head of the matrix's own elements.

    Q takes less than half of these, so it moves with the parameter; only it is held.
    """

    def __init__(self, count: int, layout: Layout, rank: int, *, error: bool) -> None:
        super().__init__(count, ["error"] if error else [])
        self.arrays["q"] = np.zeros(layout.sizes[1], np.float32)
        self._places = [(each.start, each.q, rank * each.columns) for each in layout.coded]

    def memory(self) -> Mapping[str, NDArray[Any]]:
        return self.arrays

    def read(self, field: str) -> Floats:
        if field != "q":
            return super().read(field)
        values = np.zeros(self.count, np.float32)
        for start, at, size in self._places:
            values[start : start + size] = self.arrays["q"][at : at + size]
        return values

    def write(self, field: str, values: Floats) -> None:
        if field != "q":
            super().write(field, values)
            return
        for start, at, size in self._places:
            self.arrays["q"][at : at + size] = values[start : start + size]


class PowerSGD(SumCodec):
    """See the module. ``compress.rank`` is the number of columns of the factors."""

    name = "powersgd"
    whole = True
    replays = True

    def __init__(self, settings: Settings, kernels: Kernels | None = None) -> None:
        super().__init__(settings)
        self.rank = settings.rank
        self._maths: Factors = Factors() if kernels is None else NativeFactors(kernels)
        self._layouts: dict[tuple[int, tuple[Matrix, ...]], Layout] = {}

    def check(self, shapes: Sequence[Sequence[int]]) -> str:
        """One line for the user if none of these parameters would be coded, else empty."""
        return check(self.rank, shapes)

    def forms(self, count: int, matrices: Sequence[Matrix], ranks: int) -> tuple[Form, ...]:
        first, second = self._layout(count, matrices).sizes
        return (Form("float32", first),) + ((Form("float32", second),) if second else ())

    def store(self, count: int, matrices: Sequence[Matrix]) -> Store | None:
        layout = self._layout(count, matrices)
        return FactorStore(count, layout, self.rank, error=self.settings.error_feedback)

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
        layout = self._layout(values.shape[0], matrices)
        assert isinstance(store, FactorStore)
        held, basis = store.arrays.get("error"), store.arrays["q"]
        self._first(layout, values, held, basis, arrays[0])
        yield 0
        at = 0
        for low, high in layout.uncoded:
            values[low:high] = arrays[0][at : at + high - low]
            divide(values[low:high], divisor)
            at += high - low
        if layout.coded:
            sums = arrays[1]
            self._second(layout, values, arrays[0], sums)
            own = sums.copy()
            yield 1
            divide(sums, divisor)
            self._decode(layout, values, held, basis, arrays[0], own, sums)

    def _first(
        self, layout: Layout, values: Floats, held: Floats | None, basis: Floats, out: Floats
    ) -> None:
        """Add what was held back, and fill round 0: what is uncoded, then P of each matrix."""
        at = 0
        for low, high in layout.uncoded:
            out[at : at + high - low] = values[low:high]
            at += high - low
        for each in layout.coded:
            m, p, q = self._views(each, values, out, basis)
            error = None if held is None else held[each.start : each.stop].reshape(m.shape)
            self._renew(q)
            self._maths.rows(m, error, q, p)

    def _second(self, layout: Layout, values: Floats, first: Floats, out: Floats) -> None:
        """Make each P orthonormal, and fill round 1: Q of each matrix."""
        for each in layout.coded:
            m, p, q = self._views(each, values, first, out)
            if np.isfinite(p).all():
                self._maths.orthogonalise(p)
                self._maths.columns(m, p, q)
            else:
                q.fill(np.nan)

    def _decode(
        self,
        layout: Layout,
        values: Floats,
        held: Floats | None,
        basis: Floats,
        first: Floats,
        own: Floats,
        mean: Floats,
    ) -> None:
        """Keep each matrix's error and Q, and write what was decoded over it.

        Where a rank's gradient held NaN or Inf, or sums overflowed, the matrix becomes NaN on all
        ranks and nothing is kept.
        """
        for each in layout.coded:
            m, p, q = self._views(each, values, first, mean)
            if not np.isfinite(q).all():
                m.fill(np.nan)
                continue
            mine = own[each.q : each.q + q.size].reshape(q.shape)
            error = None if held is None else held[each.start : each.stop].reshape(m.shape)
            basis[each.q : each.q + q.size] = q.reshape(-1)
            if error is None or float(np.abs(mine).max()) * self.rank < LARGE:
                self._maths.apply(m, error, p, mine, q)
                continue
            left = np.empty_like(m)
            self._maths.apply(m, left, p, mine, q)
            if np.isfinite(left).all():
                error[...] = left

    def _renew(self, q: Floats) -> None:
        """Make Q's rows orthonormal; rows of zeros become random ones first."""
        for row in np.flatnonzero(~q.any(axis=1)):
            q[row] = fresh_row(self.settings.seed, q.shape[1], int(row))
        self._maths.orthogonalise(q)

    def _views(
        self, each: Coded, values: Floats, first: Floats, second: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """A matrix, its P and its Q, in place."""
        rank = self.rank
        return (
            values[each.start : each.stop].reshape(each.rows, each.columns),
            first[each.p : each.p + rank * each.rows].reshape(rank, each.rows),
            second[each.q : each.q + rank * each.columns].reshape(rank, each.columns),
        )

    def _layout(self, count: int, matrices: Sequence[Matrix]) -> Layout:
        key = (count, tuple(matrices))
        if key not in self._layouts:
            self._layouts[key] = lay_out(count, matrices, self.rank)
        return self._layouts[key]


def fresh_row(seed: int, columns: int, row: int) -> Floats:
    """What replaces a row of zeros in Q; of nothing that a new layout of buckets would change."""
    made: Floats = units(zlib.crc32(f"{seed} {columns} {row}".encode()), columns) - np.float32(0.5)
    return made


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
