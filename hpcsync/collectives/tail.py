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
from ..codecs.gpu.forms import Coder
from ..codecs.gpu.room import Length
from ..device import Stream, dtype_of
from ..device.base import Array

_FLOAT32 = dtype_of("float32")


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


class QueuedTail:
    """``Tailed`` for pieces in the memory of a device.

    Args:
        codec: for the elements before the last ``tail``, on ``stream``.
    """

    def __init__(self, codec: Coder, tail: int, stream: Stream) -> None:
        self.name = codec.name
        self._codec, self._tail, self._stream = codec, tail, stream
        self._room = 4 * tail

    def capacity(self, count: int) -> int:
        return self._room + self._codec.capacity(count - self._tail)

    def expected(self, count: int) -> float:
        return self._room + self._codec.expected(count - self._tail)

    def store(self, count: int, role: str) -> Store | None:
        return self._codec.store(count - self._tail, role)

    def encode(
        self, values: Array, out: Array, store: Store | None, moment: Moment
    ) -> int | Length:
        split = values.shape[0] - self._tail
        self._stream.copy(self._plain(out), values[split:])
        return self._plus(self._codec.encode(values[:split], out[self._room :], store, moment))

    def decode(self, data: Array, out: Array) -> None:
        split = out.shape[0] - self._tail
        self._stream.copy(out[split:], self._plain(data))
        self._codec.decode(data[self._room :], out[:split])

    def decode_add(self, data: Array, out: Array) -> None:
        split = out.shape[0] - self._tail
        self._stream.reduce([out[split:]], [out[split:], self._plain(data)], _FLOAT32)
        self._codec.decode_add(data[self._room :], out[:split])

    def combine(
        self,
        own: Array,
        place: int,
        others: Sequence[Array],
        divisor: int,
        out: Array,
        store: Store | None,
        moment: Moment,
    ) -> int | Length:
        split = own.shape[0] - self._tail
        parts = [self._plain(data) for data in others]
        parts.insert(place, own[split:])
        self._stream.reduce([own[split:], self._plain(out)], parts, _FLOAT32, divisor)
        coded = [data[self._room :] for data in others]
        return self._plus(
            self._codec.combine(
                own[:split], place, coded, divisor, out[self._room :], store, moment
            )
        )

    def _plain(self, data: Array) -> Array:
        return data[: self._room].view(_FLOAT32.storage)

    def _plus(self, used: int | Length) -> int | Length:
        return used + self._room if isinstance(used, int) else used.plus(self._room)


def tailed(code: Coder, codec: PieceCodec, tail: int, stream: Stream | None) -> Coder:
    """``code``, which is the codec's where the stream works, for pieces whose last ``tail``
    elements are not coded."""
    return Tailed(codec, tail) if stream is None else QueuedTail(code, tail, stream)
