"""fp16: IEEE half precision; 11 bits of precision, magnitudes up to 65504."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Floats
from .blocked import BlockedCodec
from .rounding import magnitude_bits, narrowed


class Fp16(BlockedCodec):
    """Half of the bytes. Values that are too large become Inf; NaN stays NaN."""

    name = "fp16"
    code = np.dtype(np.uint16)

    def quantise(self, values: Floats, seed: int | None) -> NDArray[Any]:
        size = magnitude_bits(values)
        sign = (values.view(np.uint32) >> np.uint32(16)) & np.uint32(0x8000)
        code = narrowed(values, 13, -14, seed)
        code = np.where(size >= np.uint32(0x47800000), np.uint32(0x7C00), code)  # from 65536
        code = np.where(size > np.uint32(0x7F800000), np.uint32(0x7E00), code)
        return (sign | code).astype(np.uint16)

    def value(self, codes: NDArray[Any]) -> Floats:
        return codes.view(np.float16).astype(np.float32)
