"""Allreduce of any array, now: through a staging buffer that the node shares.

Collectives are bound to memory, arrays of callers come and go: pieces of them are copied into a
staging buffer and back. A piece is padded to one of a few sizes, so that few bindings serve all.
"""

from __future__ import annotations

from ..device import dtype_of
from ..device.base import Array
from ..transports.base import Buffer
from .collective import Collective
from .context import Collectives

_SIZES = (1 << 12, 1 << 16, 1 << 19, 1 << 22)  # bytes


class Eager:
    """Blocking allreduces of a rank; calls are collective and in the same order on all ranks."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._staging: dict[tuple[str, bool], Buffer] = {}
        self._bound: dict[tuple[str, bool, int], Collective] = {}

    def allreduce(self, data: Array, dtype: str, *, average: bool) -> None:
        """Replace ``data`` (1-D uint8, elements of ``dtype``) by the sum or mean over ranks.

        Raises:
            ValueError: the dtype cannot be added.
        """
        dtype_of(dtype)
        if self._collectives.runtime.size == 1:
            return
        if (dtype, average) not in self._staging:
            buffer = self._collectives.buffer(_SIZES[-1], bindings=len(_SIZES))
            self._staging[dtype, average] = buffer
        for start in range(0, data.shape[0], _SIZES[-1]):
            piece = data[start : start + _SIZES[-1]]
            room = next(size for size in _SIZES if size >= piece.shape[0])
            place = self._staging[dtype, average].own
            place[: piece.shape[0]] = piece
            place[piece.shape[0] : room] = 0
            collective = self._collective(dtype, average, room)
            collective.start()
            collective.wait()
            piece[:] = place[: piece.shape[0]]

    def _collective(self, dtype: str, average: bool, room: int) -> Collective:
        key = (dtype, average, room)
        if key not in self._bound:
            kind = dtype_of(dtype)
            self._bound[key] = self._collectives.allreduce(
                self._staging[dtype, average],
                kind,
                count=room // kind.itemsize,
                average=average,
                label=f"allreduce of {dtype}",
            )
        return self._bound[key]
