"""A coded piece whose last elements go as they are.

A bucket ends with parameters that are not coded and with a few flags. Sent apart they would cost a
message for little; so they travel in front of the last coded piece.

    message   | last elements, float32 | coded elements |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..codecs import Moment, PieceCodec, Store
from ..codecs.base import Bytes, Floats, divide


class Tailed(PieceCodec):
    """``codec`` for all elements of a piece but the last ``tail``, which are not coded."""

    def __init__(self, codec: PieceCodec, tail: int) -> None:
        super().__init__(codec.settings)
        self.name, self.block = codec.name, codec.block
        self._codec = codec
        self._tail = tail
        self._room = 4 * tail

    def capacity(self, count: int) -> int:
        return self._room + self._codec.capacity(count - self._tail)

    def expected(self, count: int) -> float:
        return self._room + self._codec.expected(count - self._tail)

    def store(self, count: int, role: str) -> Store | None:
        return self._codec.store(count - self._tail, role)

    def encode(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> int:
        split = len(values) - self._tail
        out[: self._room] = values[split:].view(np.uint8)
        return self._room + self._codec.encode(values[:split], out[self._room :], store, moment)

    def decode(self, data: Bytes, out: Floats) -> None:
        split = len(out) - self._tail
        out[split:].view(np.uint8)[:] = data[: self._room]
        self._codec.decode(data[self._room :], out[:split])

    def decode_add(self, data: Bytes, out: Floats) -> None:
        split = len(out) - self._tail
        out[split:] += self._plain(data)
        self._codec.decode_add(data[self._room :], out[:split])

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
        split = len(own) - self._tail
        parts = [self._plain(data) for data in others]
        parts.insert(place, own[split:])
        total = parts[0].copy()
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and Inf are passed on
            for part in parts[1:]:
                total += part
            if divisor != 1:
                divide(total, divisor)
        own[split:] = total
        out[: self._room] = total.view(np.uint8)
        coded = [data[self._room :] for data in others]
        return self._room + self._codec.combine(
            own[:split], place, coded, divisor, out[self._room :], store, moment
        )

    def _plain(self, data: Bytes) -> Floats:
        """The last elements of a message; ``data`` begins on a cache line."""
        return data[: self._room].view(np.float32)
