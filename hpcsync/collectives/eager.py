"""Allreduce of any tensor, now: through a staging buffer that the node shares.

Collectives are bound to memory, tensors of callers come and go: pieces of them are copied into a
staging buffer and back. A piece is padded to one of a few sizes, so that few bindings serve all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ..device import Event, Stream, dtype_of
from ..transports.base import Buffer
from .collective import Collective
from .context import Collectives

_SIZES = (1 << 12, 1 << 16, 1 << 19, 1 << 22)  # bytes


class Eager:
    """Blocking allreduces of a rank; calls are collective and in the same order on all ranks.

    On a device the host waits for the other hosts, and the computation for the sums.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._staging: dict[tuple[str, bool], tuple[Buffer, Tensor]] = {}
        self._bound: dict[tuple[str, bool, int], Collective] = {}
        self._last: Event | None = None  # where the staging buffers were used last

    def allreduce(self, data: Tensor, dtype: str, *, average: bool) -> None:
        """Replace ``data`` by the sum or mean over ranks.

        Args:
            data: 1-D uint8 in the memory of the collectives' device: elements of ``dtype``.

        Raises:
            ValueError: the dtype cannot be added.
        """
        dtype_of(dtype)
        if self._collectives.runtime.size == 1:
            return
        stream = self._collectives.device.current()
        if self._last is not None:  # that may have been in another stream
            stream.wait(self._last)
        for start in range(0, data.shape[0], _SIZES[-1]):
            self._piece(stream, data[start : start + _SIZES[-1]], dtype, average)
        self._last = stream.record()
        self._collectives.recorder.later.settle()  # no step does, where nothing else is exchanged

    def _piece(self, stream: Stream, piece: Tensor, dtype: str, average: bool) -> None:
        length = piece.shape[0]
        room = next(size for size in _SIZES if size >= length)
        place = self._place(dtype, average)

        def enter() -> None:
            with torch.no_grad():
                place[:length].copy_(piece)
                place[length:room].zero_()

        def leave() -> None:
            with torch.no_grad():
                piece.copy_(place[:length])

        stream.apply(enter)
        collective = self._collective(dtype, average, room)
        collective.start(after=[stream.record()])
        collective.wait()
        collective.join(stream)
        stream.apply(leave)

    def _place(self, dtype: str, average: bool) -> Tensor:
        key = (dtype, average)
        if key not in self._staging:
            buffer = self._collectives.arena(_SIZES[-1], bindings=len(_SIZES))
            self._staging[key] = buffer, from_dlpack(buffer.own)
        return self._staging[key][1]

    def _collective(self, dtype: str, average: bool, room: int) -> Collective:
        key = (dtype, average, room)
        if key not in self._bound:
            kind = dtype_of(dtype)
            self._bound[key] = self._collectives.allreduce(
                self._staging[dtype, average][0],
                kind,
                count=room // kind.itemsize,
                average=average,
                label=f"allreduce of {dtype}",
            )
        return self._bound[key]
