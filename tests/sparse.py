"""Gradients of many kinds, for codecs that send a few of their elements."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hpcsync.codecs.base import Floats, Moment, Store
from hpcsync.codecs.sparse import SparseCodec
from hpcsync.device import kernels
from hpcsync.device.kernels import empty_bytes

NATIVE = kernels.load()
LENGTHS = [0, 1, 2, 7, 15, 16, 17, 255, 256, 257, 511, 1023, 1024, 1025, 4099, 65537]


def normal(rng: np.random.Generator, count: int) -> Floats:
    return rng.standard_normal(count).astype(np.float32)


def heavy(rng: np.random.Generator, count: int) -> Floats:
    return rng.standard_cauchy(count).astype(np.float32)


def mostly_zeros(rng: np.random.Generator, count: int) -> Floats:
    return normal(rng, count) * (rng.random(count) < 0.015).astype(np.float32)


def few(rng: np.random.Generator, count: int) -> Floats:
    return normal(rng, count) * (rng.random(count) < 0.002).astype(np.float32)


def constants(rng: np.random.Generator, count: int) -> Floats:
    return np.full(count, -0.25, np.float32)


def levels(rng: np.random.Generator, count: int) -> Floats:
    """Many ties at every magnitude, as values that were rounded coarsely have."""
    return np.round(normal(rng, count) * 4) / 4


def clustered(rng: np.random.Generator, count: int) -> Floats:
    """All that is large stands together, so that blocks of indices are full."""
    values = normal(rng, count) * np.float32(1e-3)
    values[count // 3 : count // 3 + count // 80] += 5.0
    return values


def huge_and_tiny(rng: np.random.Generator, count: int) -> Floats:
    power = rng.uniform(-45, 38, count)
    return (np.sign(normal(rng, count)) * 10.0**power).astype(np.float32)


Make = Callable[[np.random.Generator, int], Floats]
KINDS: list[Make] = [normal, heavy, mostly_zeros, few, constants, levels, clustered, huge_and_tiny]


def same(left: Floats, right: Floats) -> None:
    assert left.dtype == right.dtype
    np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))


def piece(codec: SparseCodec, values: Floats, store: Store | None, moment: Moment) -> Floats:
    """What a coded piece decodes to."""
    out = empty_bytes(codec.capacity(values.shape[0]))
    used = codec.encode(values, out, store, moment)
    assert used <= out.shape[0]
    decoded = np.full_like(values, 7.0)
    codec.decode(out[:used], decoded)
    return decoded
