"""The Hadamard rotation of a piece in NumPy: the same bits as cuda/hpcsync_block_int4.h.

Blocks of 256 values are multiplied by the Hadamard matrix in Sylvester's order. The fewer than 256
at the end of a piece are cut into parts of 64, 16, 4 and 1: powers of 4, so that the factors that
make all coefficients weigh the same are powers of two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Floats

BLOCK = 256
PARTS = (BLOCK, 64, 16, 4, 1)  # sizes of the rotations of a piece, in this order

Array = NDArray[Any]


def _parts(values: Array) -> list[Array]:
    """``values`` (1-D) cut for rotation: views of shape (number, size)."""
    views, start = [], 0
    for size in PARTS:
        stop = start + (values.shape[0] - start) // size * size
        views.append(values[start:stop].reshape(-1, size))
        start = stop
    return views


def _butterfly(rows: Array) -> None:
    """Multiply each row by its Hadamard matrix, in place: distance 1 first, then 2, 4 ..."""
    count, size = rows.shape
    stride = 1
    while stride < size:
        pairs = rows.reshape(count, size // (2 * stride), 2, stride)
        below = pairs[:, :, 0] - pairs[:, :, 1]
        pairs[:, :, 0] += pairs[:, :, 1]
        pairs[:, :, 1] = below
        stride *= 2


def rotate(values: Floats) -> Floats:
    """Coefficients of any number of float32 values."""
    coefficients = np.array(values, np.float32)
    for rows in _parts(coefficients):
        rows *= np.float32(1 / 16 / rows.shape[1] ** 0.5)
        _butterfly(rows)
    return coefficients


def unrotate(coefficients: Array) -> NDArray[np.int32]:
    """Values of whole coefficients (of at most 8 bits), exactly; not yet times their unit."""
    values = coefficients.astype(np.int32)
    for rows in _parts(values):
        _butterfly(rows)
        rows *= np.int32(16 / rows.shape[1] ** 0.5)
    return values
