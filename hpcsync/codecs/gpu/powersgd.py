"""PowerSGD; whether a matrix is spoilt by NaN or Inf, the device alone decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ...device import Event, dtype_of
from ...device.base import Array
from ...device.cuda_factors import FOUND, scratch
from ...device.cuda_launch import address_of
from ..base import Matrix
from ..powersgd import LARGE, Coded, PowerSGD, fresh_row, lay_out
from .room import Room
from .sums import QueuedSums, Share

_FLOAT32 = dtype_of("float32")


class LowRank(QueuedSums[PowerSGD]):
    """powersgd."""

    def __init__(self, codec: PowerSGD, room: Room, count: int, matrices: Sequence[Matrix]) -> None:
        super().__init__(codec, room, count, matrices)
        self._kernels, self._rank = room.kernels.factors, codec.rank
        self._layout = lay_out(count, matrices, codec.rank)
        coded = self._layout.coded
        sizes = [scratch(each.rows, each.columns, codec.rank) for each in coded]
        self._partials = room.empty(max(sizes, default=0), np.float32)
        self._own = room.empty(self._layout.sizes[1], np.float32)
        self._found = room.empty(FOUND * len(coded), np.uint32)
        self._fresh = {columns: self._rows(columns) for columns in {each.columns for each in coded}}

    def _rounds(self, share: Share) -> Iterator[int | Event]:
        values, arrays, store, divisor = share.values, share.arrays, share.store, share.divisor
        assert store is not None
        layout, stream = self._layout, self._stream
        held, basis = store.arrays.get("error"), store.arrays["q"]
        self._first(values, held, basis, arrays[0])
        yield 0
        at = 0
        for low, high in layout.uncoded:
            part = arrays[0][at : at + high - low]
            stream.reduce([values[low:high]], [part], _FLOAT32, divisor)
            at += high - low
        if layout.coded:
            sums = arrays[1]
            self._second(values, arrays[0], sums)
            stream.copy(self._own, sums)
            yield 1
            if divisor != 1:
                stream.reduce([sums], [sums], _FLOAT32, divisor)
            self._decode(values, held, basis, arrays[0], sums)

    def _first(self, values: Array, held: Array | None, basis: Array, out: Array) -> None:
        """Add what was held back, and fill round 0: what is uncoded, then P of each matrix."""
        at = 0
        for low, high in self._layout.uncoded:
            self._stream.copy(out[at : at + high - low], values[low:high])
            at += high - low
        for each in self._layout.coded:
            error = None if held is None else address_of(held[each.start : each.stop])
            q, fresh = self._q(each, basis), address_of(self._fresh[each.columns])
            with self._stream:
                self._kernels.renew(q, self._rank, each.columns, fresh)
                self._kernels.orthogonalise(q, self._rank, each.columns)
                self._kernels.rows(
                    *(self._m(each, values), error, each.rows, each.columns),
                    *(q, self._rank, self._p(each, out)),
                )

    def _second(self, values: Array, first: Array, out: Array) -> None:
        """Make each P orthonormal, and fill round 1: Q of each matrix.

        NaN and Inf in P make NaN in Q, of which the mean tells all ranks.
        """
        for each in self._layout.coded:
            p, partials = self._p(each, first), address_of(self._partials)
            with self._stream:
                self._kernels.orthogonalise(p, self._rank, each.rows)
                self._kernels.columns(
                    *(self._m(each, values), each.rows, each.columns),
                    *(p, self._rank, self._q(each, out), partials),
                )

    def _decode(
        self, values: Array, held: Array | None, basis: Array, first: Array, mean: Array
    ) -> None:
        """Keep each matrix's error and Q, and write what was decoded over it."""
        self._stream.fill(self._found, 0)
        for place, each in enumerate(self._layout.coded):
            found = address_of(self._found[FOUND * place : FOUND * (place + 1)])
            m, shape = self._m(each, values), (each.rows, each.columns)
            factors = (self._p(each, first), self._q(each, self._own), self._q(each, mean))
            error = None if held is None else address_of(held[each.start : each.stop])
            with self._stream:
                self._kernels.judge(m, *shape, *factors, self._rank, LARGE, found)
                self._kernels.apply(m, error, *shape, *factors, self._rank, found)
                size, kept = self._rank * each.columns, self._q(each, basis)
                self._kernels.keep(factors[2], size, found, kept)

    def _m(self, each: Coded, values: Array) -> int:
        return address_of(values[each.start : each.stop])

    def _p(self, each: Coded, first: Array) -> int:
        return address_of(first[each.p : each.p + self._rank * each.rows])

    def _q(self, each: Coded, second: Array) -> int:
        return address_of(second[each.q : each.q + self._rank * each.columns])

    def _rows(self, columns: int) -> Array:
        """Device memory with the rows that replace those of zeros."""
        seed = self._codec.settings.seed
        rows: NDArray[np.float32] = np.concatenate(
            [fresh_row(seed, columns, row) for row in range(self._rank)]
        )
        made = self._room.empty(rows.shape[0], np.float32)
        self._room.up(made, rows)
        return made
