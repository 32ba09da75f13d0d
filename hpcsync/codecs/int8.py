"""int8: whole numbers from -127 to 127 with a scale for each block of 256 elements."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Floats
from .blocked import BlockedCodec
from .rounding import rounded


class Int8(BlockedCodec):
    """A quarter of the bytes; symmetric, so that nothing is favoured by its sign."""

    name = "int8"
    code = np.dtype(np.int8)
    levels = 127.0

    def quantise(self, values: Floats, seed: int | None) -> NDArray[Any]:
        return np.clip(rounded(values, seed), -127, 127).astype(np.int8)

    def value(self, codes: NDArray[Any]) -> Floats:
        return codes.astype(np.float32)
