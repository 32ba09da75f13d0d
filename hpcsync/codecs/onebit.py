"""onebit: the sign of every element, and one scale for 1024 of them.

With h = g + error, a block is coded as its sign bits and the mean of |h| over its elements, those
of a partial last block and no padding; the error store keeps h less what it decodes to, in
float32 (Seide et al. 2014; scale as in 1-bit Adam: Tang et al. 2021, arXiv 2102.02888). 132 bytes
for 4096. Without error feedback this loses nearly everything; there is no stochastic form, whose
scale would have to be the largest magnitude. cuda/hpcsync_block_onebit.h states the maths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..device.kernels import Kernels, address, f32, pointer, pointers, size_t
from .base import Bytes, Floats, Moment, PieceCodec, Settings, Store

BLOCK = 1024
SHRINK = np.float32(2.0**-10)


def blocks_of(count: int) -> int:
    return -(-count // BLOCK)


def _sums(magnitudes: Floats) -> Floats:
    """Sum of each row of 1024: 16 partial sums by index mod 16, then their tree."""
    lanes = np.zeros((magnitudes.shape[0], 16), np.float32)
    for column in range(0, BLOCK, 16):
        lanes += magnitudes[:, column : column + 16]
    for step in (8, 4, 2, 1):
        lanes = lanes[:, :step] + lanes[:, step:]
    return lanes[:, 0]


def block_scales(h: Floats) -> Floats:
    """The mean of |h| of each block; NaN where the block holds a NaN or Inf."""
    count = h.shape[0]
    rows = np.zeros((blocks_of(count), BLOCK), np.float32)
    rows.reshape(-1)[:count] = np.abs(h)
    counts = np.full(rows.shape[0], BLOCK, np.float32)
    counts[-1:] = (count - 1) % BLOCK + 1
    total = _sums(rows)
    means = total / counts
    large = ~np.isfinite(total)
    if large.any():
        means[large] = _sums(rows[large] * SHRINK) / (counts[large] * SHRINK)
    return np.where(np.isfinite(means), means, np.float32(np.nan))


class OneBit(PieceCodec):
    """Signs and the mean magnitude of blocks of 1024."""

    name = "onebit"
    block = BLOCK

    def __init__(self, settings: Settings, kernels: Kernels | None) -> None:
        super().__init__(settings)
        self.native = kernels is not None
        if kernels is None:
            return
        self._encode = kernels.function("onebit_encode", None, address, address, size_t, address)
        self._decode = kernels.function("onebit_decode", None, address, size_t, address)
        self._decode_add = kernels.function("onebit_decode_add", None, address, size_t, address)
        sources = (address, size_t, address, size_t, size_t, f32)
        self._combine = kernels.function("onebit_combine", None, *sources, address, address)

    def capacity(self, count: int) -> int:
        return 4 * blocks_of(count) + (count + 7) // 8

    def encode(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> int:
        error = None if store is None else store.read("error")
        if self.native:
            self._encode(pointer(values), pointer(error), values.shape[0], pointer(out))
        else:
            _encode(values, out, error)
        return self.capacity(values.shape[0])

    def decode(self, data: Bytes, out: Floats) -> None:
        if self.native:
            self._decode(pointer(data), out.shape[0], pointer(out))
        else:
            out[:] = _decoded(data, out.shape[0])

    def decode_add(self, data: Bytes, out: Floats) -> None:
        if self.native:
            self._decode_add(pointer(data), out.shape[0], pointer(out))
        else:
            with np.errstate(all="ignore"):
                out += _decoded(data, out.shape[0])

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
        if not self.native:
            return super().combine(own, place, others, divisor, out, store, moment)
        count, sources = own.shape[0], pointers(others)
        error = pointer(None if store is None else store.read("error"))
        parts = (place, sources, len(others), count, float(divisor))
        self._combine(pointer(own), *parts, error, pointer(out))
        return self.capacity(count)


def _encode(values: Floats, out: Bytes, error: Floats | None) -> None:
    count = values.shape[0]
    with np.errstate(all="ignore"):
        h = values if error is None else values + error
        scale = block_scales(h)
        finite = np.repeat(np.isfinite(scale), BLOCK)[:count]
        negative = np.signbit(h) & finite
        if error is not None:
            lost = h - _signed(scale, negative)
            error[finite] = lost[finite]
    head = 4 * blocks_of(count)
    out[:head] = scale.view(np.uint8)
    out[head : head + (count + 7) // 8] = np.packbits(negative, bitorder="little")


def _signed(scale: Floats, negative: NDArray[np.bool_]) -> Floats:
    spread = np.repeat(scale, BLOCK)[: negative.shape[0]]
    return np.where(negative, -spread, spread)


def _decoded(data: Bytes, count: int) -> Floats:
    head = 4 * blocks_of(count)
    scale = np.frombuffer(data[:head].tobytes(), np.float32)
    bits = data[head : head + (count + 7) // 8]
    return _signed(scale, np.unpackbits(bits, count=count, bitorder="little").astype(np.bool_))
