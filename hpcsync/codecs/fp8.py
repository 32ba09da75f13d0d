"""fp8: e4m3fn floats with a scale for each block of 256 elements.

The format has 4 bits of exponent, 3 of mantissa and no Inf; its largest is 448 (Micikevicius et
al. 2022, "FP8 formats for deep learning", arXiv 2209.05433). Small elements keep their relative
precision down to 2^-15 of the block's largest, where int8 keeps an absolute one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Floats
from .blocked import BlockedCodec
from .rounding import narrowed


class Fp8(BlockedCodec):
    """A quarter of the bytes."""

    name = "fp8"
    code = np.dtype(np.uint8)
    levels = 448.0

    def quantise(self, values: Floats, seed: int | None) -> NDArray[Any]:
        sign = (values.view(np.uint32) >> np.uint32(24)) & np.uint32(0x80)
        code = np.minimum(narrowed(values, 20, -6, seed), np.uint32(0x7E))
        return (sign | code).astype(np.uint8)

    def value(self, codes: NDArray[Any]) -> Floats:
        values: Floats = _VALUES[codes]
        return values


def _values() -> Floats:
    code = np.arange(256, dtype=np.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    normal = np.ldexp(np.float32(8) + mantissa.astype(np.float32), exponent - 10)
    tiny = np.ldexp(mantissa.astype(np.float32), np.int32(-9))
    magnitude = np.where(exponent == 0, tiny, normal).astype(np.float32)
    return np.where(code < 128, magnitude, -magnitude)


_VALUES = _values()
