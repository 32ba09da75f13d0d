"""What the codecs of one code an element share: bf16, fp16, fp8 and int8.

A coded piece is one float32 scale for each block of 256 elements, if the codec has scales, then
one code an element; little endian, without padding. A value of a block with scale s is coded as
the code of value / s. A block with a NaN or Inf has a NaN for its scale, codes of zero, and leaves
its part of the error store as it was; without scales the same goes for a single element.

Kernels: cuda/cpu/blocked.h. The methods here that compute are their NumPy reference.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..device.kernels import Kernels, address, f32, pointer, pointers, size_t, u64
from .base import Bytes, Floats, Moment, PieceCodec, Settings, Store
from .rounding import block_largest, block_scales, spread

BLOCK = 256


class BlockedCodec(PieceCodec):
    """One code for each element, and a scale a block if ``levels`` is not 0.

    Attributes:
        code: NumPy type of a code.
        levels: the largest magnitude that is coded, to which a block's largest is scaled.
    """

    block = BLOCK
    code: ClassVar[np.dtype[Any]]
    levels: ClassVar[float] = 0.0

    def __init__(self, settings: Settings, kernels: Kernels | None = None) -> None:
        super().__init__(settings)
        self._native = _Native(self.name, kernels) if kernels else None

    @abstractmethod
    def quantise(self, values: Floats, seed: int | None) -> NDArray[Any]:
        """Codes of values that are divided by their scales; ``seed`` rounds at random."""

    @abstractmethod
    def value(self, codes: NDArray[Any]) -> Floats:
        """What codes stand for, before the scale."""

    def capacity(self, count: int) -> int:
        return self._header(count) + count * self.code.itemsize

    def encode(self, values: Floats, out: Bytes, store: Store | None, moment: Moment) -> int:
        error = None if store is None else store.arrays["error"]
        seed = moment.seed if self.settings.stochastic else None
        if self._native:
            self._native.encode(values, out, error, seed)
        else:
            with np.errstate(all="ignore"):
                self._encode(values, out, error, seed)
        return self.capacity(values.shape[0])

    def decode(self, data: Bytes, out: Floats) -> None:
        if self._native:
            self._native.decode(data, out)
        else:
            with np.errstate(all="ignore"):
                out[:] = self._decoded(data, out.shape[0])

    def decode_add(self, data: Bytes, out: Floats) -> None:
        if self._native:
            self._native.decode_add(data, out)
        else:
            with np.errstate(all="ignore"):
                np.add(out, self._decoded(data, out.shape[0]), out=out)

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
        if self._native is None:
            with np.errstate(all="ignore"):
                return super().combine(own, place, others, divisor, out, store, moment)
        error = None if store is None else store.arrays["error"]
        seed = moment.seed if self.settings.stochastic else None
        self._native.combine(own, place, others, divisor, out, error, seed)
        return self.capacity(own.shape[0])

    def _header(self, count: int) -> int:
        return 4 * -(-count // BLOCK) if self.levels else 0

    def _encode(self, values: Floats, out: Bytes, error: Floats | None, seed: int | None) -> None:
        count = values.shape[0]
        if not count:
            return
        header = self._header(count)
        held = values if error is None else values + error
        if self.levels:
            scale, inverse = block_scales(block_largest(held, BLOCK), self.levels)
            out[:header] = scale.view(np.uint8)
            fine = np.isfinite(spread(scale, BLOCK, count))
            scaled = np.where(fine, held * spread(inverse, BLOCK, count), np.float32(0))
        else:
            scaled = held
        codes = self.quantise(scaled, seed)
        out[header : self.capacity(count)] = codes.view(np.uint8)
        if error is None:
            return
        decoded = self.value(codes)
        if self.levels:
            decoded = decoded * spread(scale, BLOCK, count)
        error[:] = np.where(np.isfinite(decoded), held - decoded, error)

    def _decoded(self, data: Bytes, count: int) -> Floats:
        header = self._header(count)
        values = self.value(data[header : self.capacity(count)].view(self.code))
        if self.levels:
            values = values * spread(data[:header].view(np.float32), BLOCK, count)
        return values


class _Native:
    """The kernels of one codec, by the prefix of their names; ``seed`` None rounds to nearest."""

    def __init__(self, name: str, kernels: Kernels) -> None:
        random = (ctypes.c_int, u64)
        self._encode = kernels.function(
            f"{name}_encode", None, address, address, size_t, *random, address
        )
        self._decode = kernels.function(f"{name}_decode", None, address, size_t, address)
        self._decode_add = kernels.function(f"{name}_decode_add", None, address, size_t, address)
        sources = (address, size_t, address, size_t, size_t, f32)
        self._combine = kernels.function(
            f"{name}_combine", None, *sources, address, *random, address
        )

    def encode(self, values: Floats, out: Bytes, error: Floats | None, seed: int | None) -> None:
        self._encode(pointer(values), pointer(error), values.shape[0], *_chance(seed), pointer(out))

    def decode(self, data: Bytes, out: Floats) -> None:
        self._decode(pointer(data), out.shape[0], pointer(out))

    def decode_add(self, data: Bytes, out: Floats) -> None:
        self._decode_add(pointer(data), out.shape[0], pointer(out))

    def combine(
        self,
        own: Floats,
        place: int,
        others: Sequence[Bytes],
        divisor: int,
        out: Bytes,
        error: Floats | None,
        seed: int | None,
    ) -> None:
        listed = pointers(others)
        count = own.shape[0]
        self._combine(
            pointer(own),
            place,
            listed,
            len(others),
            count,
            divisor,
            pointer(error),
            *_chance(seed),
            pointer(out),
        )


def _chance(seed: int | None) -> tuple[int, int]:
    return (0, 0) if seed is None else (1, seed)
