"""Rounding of the codecs, as NumPy computes it: the same bits as cuda/hpcsync_block.h.

Rounding at random is without bias: the integer below y + u, u uniform in [0, 1). u comes from a
generator without state, a hash of a 64-bit seed and of an element's index, so that each element's
number can be made anywhere, in any order, on any device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]

FLOAT_MAX = np.finfo(np.float32).max
_MASK = (1 << 64) - 1


def random_key(seed: int) -> tuple[np.uint32, np.uint32]:
    """Two words for a seed, by the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    z = (seed + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return np.uint32(z & 0xFFFFFFFF), np.uint32(z >> 32)


def random_at(seed: int, index: NDArray[Any]) -> Words:
    """32 random bits for each index (taken as uint32), ``hpcsync_random`` of the header."""
    first, second = random_key(seed)
    x = index.astype(np.uint32) ^ first
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x21F0AAAD)
    x += second
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x735A2D97)
    x ^= x >> np.uint32(15)
    return x


def random_bits(seed: int, count: int, start: int = 0) -> Words:
    """32 random bits for each of ``count`` elements from index ``start``."""
    return random_at(seed, np.arange(start, start + count, dtype=np.uint64))


def unit(random: Words) -> Floats:
    """The upper 24 of 32 random bits as float32 in [0, 1)."""
    made: Floats = (random >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return made


def units(seed: int, count: int, start: int = 0) -> Floats:
    """A number of [0, 1) for each of ``count`` elements from index ``start``."""
    return unit(random_bits(seed, count, start))


def rounded(y: Floats, seed: int | None) -> Floats:
    """Whole numbers beside ``y`` (1-D, |y| < 2^22), as float32.

    Args:
        seed: rounds at random by the elements' indices; None to nearest, ties to even.
    """
    if seed is None:
        return np.rint(y)
    below: Floats = np.floor(y + units(seed, y.shape[0]))
    return below
