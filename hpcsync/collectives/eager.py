"""Allreduce of any array, now: through a staging buffer that the node shares.

Collectives are bound to memory, arrays of callers come and go: pieces of them are copied into a
staging buffer and back. A piece is padded to one of a few sizes, so that few bindings serve all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from .. import codecs
from ..codecs import Matrix
from ..config import Config
from ..device import dtype_of
from ..device.base import Array
from ..transports.base import Buffer
from .coding import Coding, settings_of
from .collective import Collective
from .context import Collectives

_SIZES = (1 << 12, 1 << 16, 1 << 19, 1 << 22)  # bytes


class _Kind(NamedTuple):
    """What needs memory and bindings of its own."""

    dtype: str
    average: bool
    codec: str


class Eager:
    """Blocking allreduces of a rank; calls are collective and in the same order on all ranks."""

    def __init__(self, collectives: Collectives, config: Config | None = None) -> None:
        self._collectives = collectives
        self._config = config or Config()
        self._staging: dict[_Kind, Buffer] = {}
        self._bound: dict[tuple[_Kind, int], Collective] = {}

    def allreduce(self, data: Array, dtype: str, *, average: bool, codec: str = "none") -> None:
        """Replace ``data`` (1-D uint8, elements of ``dtype``) by the sum or mean over ranks.

        Raises:
            ValueError: the dtype cannot be added or coded, or there is no such codec.
        """
        dtype_of(dtype)
        if self._collectives.runtime.size == 1:
            return
        kind = _Kind(dtype, average, codec)
        if kind not in self._staging:
            self._staging[kind] = self._collectives.buffer(_SIZES[-1], bindings=len(_SIZES))
        for start in range(0, data.shape[0], _SIZES[-1]):
            piece = data[start : start + _SIZES[-1]]
            room = next(size for size in _SIZES if size >= piece.shape[0])
            place = self._staging[kind].own
            place[: piece.shape[0]] = piece
            place[piece.shape[0] : room] = 0
            collective = self._collective(kind, room)
            collective.start()
            collective.wait()
            piece[:] = place[: piece.shape[0]]

    def _collective(self, kind: _Kind, room: int) -> Collective:
        key = (kind, room)
        if key not in self._bound:
            dtype = dtype_of(kind.dtype)
            count = room // dtype.itemsize
            self._bound[key] = self._collectives.allreduce(
                self._staging[kind],
                dtype,
                count=count,
                average=kind.average,
                label=f"allreduce of {kind.dtype}",
                coding=self._coding(kind.codec, count),
            )
        return self._bound[key]

    def _coding(self, name: str, count: int) -> Coding | None:
        """Coding without a memory: arrays of one size need not be related."""
        if name == "none":
            return None
        compress, seed = self._config.compress, self._config.run.seed
        codec = codecs.build(name, settings_of(replace(compress, error_feedback=False), seed))
        matrices = (Matrix(0, (count,)),)
        return Coding(codec=codec, where=compress.where, count=count, matrices=matrices, seed=seed)
