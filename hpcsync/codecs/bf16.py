"""bf16: the upper half of a float32, rounded; all of its range, 8 bits of its precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Floats
from .blocked import BlockedCodec
from .rounding import magnitude_bits, random_bits

_INF, _NAN = np.uint32(0x7F800000), np.uint32(0x7FC00000)


class Bf16(BlockedCodec):
    """Half of the bytes. Values within half a step of 2^128 become Inf; NaN stays NaN."""

    name = "bf16"
    code = np.dtype(np.uint16)

    def quantise(self, values: Floats, seed: int | None) -> NDArray[Any]:
        size = magnitude_bits(values)
        sign = values.view(np.uint32) & np.uint32(0x80000000)
        if seed is None:
            addend = np.uint32(0x7FFF) + ((size >> np.uint32(16)) & np.uint32(1))
        else:
            addend = random_bits(seed, values.shape[0]) >> np.uint32(16)
        finite = np.where(size >= _INF, size, size + addend)
        rounded = np.where(size > _INF, _NAN, finite)
        return ((sign | rounded) >> np.uint32(16)).astype(np.uint16)

    def value(self, codes: NDArray[Any]) -> Floats:
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
