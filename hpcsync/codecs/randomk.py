"""Random-k: all ranks send the same random elements, which an ordinary allreduce adds.

Stich, Cordonnier and Jaggi, Sparsified SGD with memory (NeurIPS 2018): with error feedback what
was not sent accumulates; without it the sum is multiplied by elements / sent, and is unbiased.

Elements go in groups of 16 that stand together, a cache line: nothing but whole lines is read,
and there are fewer random numbers. The ranks agree by a shared seed, so no indices are sent. One
value more is NaN if any element, sent or not, would have been NaN or Inf: then all come out as
NaN, and such an element of the store stays as it was, while the others accumulate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device.kernels import Kernels, address, f32, pointer, size_t, u64
from .base import Floats, Form, Matrix, Moment, Settings, Store, SumCodec, divide
from .rounding import random_at

Indices = NDArray[np.int64]
i32 = ctypes.c_int

GROUP = 16


def picked(groups: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """``wanted`` different groups of ``groups``, all equally likely.

    One of each of ``wanted`` runs of nearly equal length; the runs' beginning is random, too.
    """
    edges = np.arange(wanted + 1) * groups // wanted
    random = random_at(seed, np.arange(wanted + 1)).astype(np.int64)
    within = random[:wanted] * np.diff(edges) >> 32
    return (edges[:-1] + within + (int(random[wanted]) * groups >> 32)) % groups


class RandomK(SumCodec):
    """``settings.ratio`` of the elements, in whole groups."""

    name = "randomk"
    block = GROUP
    replays = True

    def __init__(self, settings: Settings, kernels: Kernels | None = None) -> None:
        super().__init__(settings)
        self._native = Native(kernels) if kernels else None

    def wanted(self, count: int) -> int:
        """How many groups of ``count`` elements go."""
        groups = -(-count // GROUP)
        return min(groups, max(1, round(self.settings.ratio * groups))) if groups else 0

    def forms(self, count: int, matrices: Sequence[Matrix], ranks: int) -> tuple[Form, ...]:
        return (Form("float32", self.wanted(count) * GROUP + 1 if count else 0),)

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
        form, count = arrays[0], values.shape[0]
        if count == 0:
            yield 0
            return
        wanted, groups = self.wanted(count), -(-count // GROUP)
        scale = 1.0 if store else groups / wanted
        code = self._native or Reference()
        error = store.read("error") if store else None
        bad = code.accumulate(values, error)
        source, clear = (values, False) if error is None else (error, not bad)
        code.take(source, wanted, moment.shared_seed, clear, form[:-1])
        form[-1] = np.nan if bad else 0.0
        yield 0
        code.put(form[:-1], wanted, moment.shared_seed, divisor, scale, values)
        if not np.isfinite(form[-1]):
            values[:] = np.nan


class Reference:
    """The codec's arithmetic in NumPy."""

    def accumulate(self, values: Floats, error: Floats | None) -> bool:
        """Add values to the store where that is finite; whether it is not somewhere."""
        if error is None:
            return not bool(np.isfinite(values).all())
        with np.errstate(over="ignore", invalid="ignore"):
            made = error + values
        finite = np.isfinite(made)
        np.copyto(error, made, where=finite)
        return not bool(finite.all())

    def take(self, source: Floats, wanted: int, seed: int, clear: bool, out: Floats) -> None:
        """Copy the picked groups to ``out``, with zeros for elements beyond the end.

        Args:
            clear: zero them in ``source``.
        """
        places, slots = self._places(source.shape[0], wanted, seed)
        out[:] = 0.0
        out[slots] = source[places]
        if clear:
            source[places] = 0.0

    def put(
        self, data: Floats, wanted: int, seed: int, divisor: int, scale: float, out: Floats
    ) -> None:
        """Write the groups' sums, divided and scaled, to their elements, and zero to others."""
        places, slots = self._places(out.shape[0], wanted, seed)
        out[:] = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            mean = data[slots]
            divide(mean, divisor)
            out[places] = mean * np.float32(scale)

    def _places(self, count: int, wanted: int, seed: int) -> tuple[Indices, Indices]:
        """Indices of the picked elements, and of their slots in the form."""
        groups = picked(-(-count // GROUP), wanted, seed)
        places = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
        slots = np.flatnonzero(places < count)
        return places[slots], slots


class Native:
    """The same in C++."""

    def __init__(self, kernels: Kernels) -> None:
        self._accumulate = kernels.function(
            "sparse_accumulate", i32, address, f32, f32, address, address, size_t
        )
        self._take = kernels.function(
            "groups_take", None, address, size_t, size_t, u64, i32, address
        )
        self._put = kernels.function(
            "groups_put", None, address, size_t, size_t, u64, f32, f32, address
        )

    def accumulate(self, values: Floats, error: Floats | None) -> bool:
        """See ``hpcsync_sparse_accumulate``."""
        return bool(
            self._accumulate(pointer(values), 1.0, 0.0, None, pointer(error), values.shape[0])
        )

    def take(self, source: Floats, wanted: int, seed: int, clear: bool, out: Floats) -> None:
        """See ``hpcsync_groups_take``."""
        self._take(pointer(source), source.shape[0], wanted, seed, clear, pointer(out))

    def put(
        self, data: Floats, wanted: int, seed: int, divisor: int, scale: float, out: Floats
    ) -> None:
        """See ``hpcsync_groups_put``."""
        self._put(pointer(data), out.shape[0], wanted, seed, divisor, scale, pointer(out))
