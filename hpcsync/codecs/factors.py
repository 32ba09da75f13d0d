"""Products with low-rank factors, and orthonormal ones: NumPy and native, the same bits.

The order of every sum is stated in ``hpcsync_kernels.h``; BLAS would be free to choose another on
each machine, and ranks that decode the same factors must come to the same gradient.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device.kernels import Kernels, address, pointer, size_t
from .base import Floats

_LANES = 16  # partial sums of a dot product
_ROWS = 32  # added before they are added to the total
_EPSILON = 1e-8


class Factors:
    """The products in NumPy.

    ``m`` and ``error`` are rows x columns, ``p`` is rank x rows, ``q`` rank x columns; float32.
    """

    def rows(self, m: Floats, error: Floats | None, q: Floats, p: Floats) -> None:
        """m += error, then p = q m^T."""
        if error is not None:
            np.add(m, error, out=m)
        for k, factor in enumerate(q):
            sums = np.zeros((m.shape[0], _LANES), np.float32)
            for j in range(0, m.shape[1], _LANES):
                part = m[:, j : j + _LANES] * factor[j : j + _LANES]
                sums[:, : part.shape[1]] += part
            p[k] = _tree(sums)

    def columns(self, m: Floats, p: Floats, q: Floats) -> None:
        """q = p m."""
        q.fill(0)
        for i in range(0, m.shape[0], _ROWS):
            block = m[i : i + _ROWS]
            for k, factor in enumerate(p[:, i : i + _ROWS]):
                sums = np.zeros(m.shape[1], np.float32)
                for row, number in zip(block, factor, strict=True):
                    sums += row * number
                q[k] += sums

    def apply(self, m: Floats, error: Floats | None, p: Floats, own: Floats, mean: Floats) -> None:
        """error = m - p^T own, then m = p^T mean."""
        if error is not None:
            np.subtract(m, _product(p, own), out=error)
        m[...] = _product(p, mean)

    def orthogonalise(self, x: Floats) -> None:
        """Make the rows orthonormal by modified Gram-Schmidt, each projected twice."""
        for k, own in enumerate(x):
            norm = math.sqrt(_dot(own, own))
            _scale(own, 0.0 if norm == 0 else 1 / norm)
            for _ in range(2 if k else 0):
                for other in x[:k]:
                    _project_out(own, other)
                _scale(own, 1 / (math.sqrt(_dot(own, own)) + _EPSILON))


class NativeFactors(Factors):
    """The same bits from the native kernels."""

    def __init__(self, kernels: Kernels) -> None:
        self._rows = kernels.function(
            "factor_rows", None, address, address, size_t, size_t, address, size_t, address
        )
        self._columns = kernels.function(
            "factor_columns", None, address, size_t, size_t, address, size_t, address
        )
        self._apply = kernels.function(
            "factor_apply",
            *(None, address, address, size_t, size_t, address, address, address, size_t),
        )
        self._orthogonalise = kernels.function("orthogonalise", None, address, size_t, size_t)

    def rows(self, m: Floats, error: Floats | None, q: Floats, p: Floats) -> None:
        self._rows(pointer(m), pointer(error), *m.shape, pointer(q), q.shape[0], pointer(p))

    def columns(self, m: Floats, p: Floats, q: Floats) -> None:
        self._columns(pointer(m), *m.shape, pointer(p), p.shape[0], pointer(q))

    def apply(self, m: Floats, error: Floats | None, p: Floats, own: Floats, mean: Floats) -> None:
        arrays = pointer(p), pointer(own), pointer(mean)
        self._apply(pointer(m), pointer(error), *m.shape, *arrays, p.shape[0])

    def orthogonalise(self, x: Floats) -> None:
        self._orthogonalise(pointer(x), *x.shape)


def _tree(lanes: NDArray[Any]) -> NDArray[Any]:
    """The sums over the last axis of sixteen lanes, in the fixed order."""
    half = _LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


def _dot(x: Floats, y: Floats) -> float:
    products = x.astype(np.float64) * y
    padded = np.zeros((-(-products.shape[0] // _LANES), _LANES))
    padded.reshape(-1)[: products.shape[0]] = products
    # Along the first axis, lane by lane, in order.
    return float(_tree(np.add.reduce(padded, axis=0)))


def _scale(x: Floats, factor: float) -> None:
    x[:] = x.astype(np.float64) * factor


def _project_out(x: Floats, y: Floats) -> None:
    """x less its projection on y, which is a unit vector only to within float32's rounding."""
    square = _dot(y, y)
    if square != 0:
        x[:] = x - (_dot(y, x) / square) * y.astype(np.float64)


def _product(p: Floats, q: Floats) -> Floats:
    total: Floats = np.multiply.outer(p[0], q[0])
    for left, right in zip(p[1:], q[1:], strict=True):
        total += np.multiply.outer(left, right)
    return total
