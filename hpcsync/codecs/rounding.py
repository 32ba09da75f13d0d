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


def magnitude_bits(values: Floats) -> Words:
    """|values| as bits, which are ordered as the values are, then Inf, then NaN."""
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


def block_largest(values: Floats, block: int) -> Words:
    """The bits of the largest magnitude in each block; the last block may be shorter."""
    bits = magnitude_bits(values)
    whole = bits.shape[0] // block * block
    found: Words = bits[:whole].reshape(-1, block).max(axis=1)
    if whole < bits.shape[0]:
        found = np.append(found, bits[whole:].max())
    return found


def block_scales(largest: Words, levels: float) -> tuple[Floats, Floats]:
    """Scale and inverse of blocks whose largest magnitudes have these bits.

    ``hpcsync_block_scale``: the scale is NaN for blocks with a NaN or Inf, and both are 0 for those
    that are coded as zeros. It is bounded, so that ``levels * scale`` is finite.
    """
    most = np.nextafter(FLOAT_MAX / np.float32(levels), np.float32(0))
    sizes = largest.view(np.float32)
    with np.errstate(all="ignore"):
        inverse = np.float32(levels) / sizes
        scale = np.minimum(sizes / np.float32(levels), most)
    coded = np.isfinite(sizes) & np.isfinite(inverse)
    scale = np.where(coded, scale, np.where(np.isfinite(sizes), np.float32(0), np.float32(np.nan)))
    return scale.astype(np.float32), np.where(coded, inverse, np.float32(0)).astype(np.float32)


def spread(of_blocks: NDArray[Any], block: int, count: int) -> NDArray[Any]:
    """What is said of each block, for each of ``count`` elements."""
    return np.repeat(of_blocks, block)[:count]


def narrowed(values: Floats, drop: int, least: int, seed: int | None) -> Words:
    """Rounded codes of finite magnitudes in a format of fewer bits, ``hpcsync_narrow``.

    Args:
        drop: bits of a float32's mantissa that the format lacks.
        least: the format's least normal exponent.
        seed: rounds at random; None to nearest even.
    """
    size = magnitude_bits(values)
    shift = np.uint32(drop)
    tiny = size < np.uint32((127 + least) << 23)
    ulps = np.where(tiny, size, np.uint32(0)).view(np.float32) * np.float32(
        2.0 ** (23 - drop - least)
    )
    if seed is None:
        addend = np.uint32((1 << (drop - 1)) - 1) + ((size >> shift) & np.uint32(1))
    else:
        addend = random_bits(seed, values.shape[0]) >> np.uint32(32 - drop)
    normal = ((size + addend) >> shift) - np.uint32((126 + least) << (23 - drop))
    return np.where(tiny, rounded(ulps, seed).astype(np.uint32), normal)
