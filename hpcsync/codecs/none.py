"""none: float32 as it is."""

from __future__ import annotations

import numpy as np

from ..device.kernels import Kernels
from .base import Bytes, Floats, Moment, PieceCodec, Settings, Store


class Uncoded(PieceCodec):
    """Copies; for comparison with the others, and for pieces that are better left uncoded."""

    name = "none"
    lossless = True

    def __init__(self, settings: Settings, kernels: Kernels | None = None) -> None:
        super().__init__(settings)

    def capacity(self, count: int) -> int:
        return 4 * count

    def store(self, count: int, role: str) -> None:
        """Nothing is lost, and nothing remembered."""

    def encode(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> int:
        used = int(4 * values.shape[0])
        out[:used] = values.view(np.uint8)
        return used

    def decode(self, data: Bytes, out: Floats) -> None:
        out.view(np.uint8)[:] = data[: 4 * out.shape[0]]

    def decode_add(self, data: Bytes, out: Floats) -> None:
        with np.errstate(all="ignore"):
            np.add(out, data[: 4 * out.shape[0]].view(np.float32), out=out)
