"""int8_shared: whole numbers of scales that all ranks share, added as integers.

    round 0    the largest magnitude of each block of 256 elements, as the bits of a float32:
               maximum over ranks, so that all know the same scales
    round 1    whole numbers up to L, times the scale: sum over ranks
    round 2    with ``verify``: the sum of each rank's numbers, modulo 2^32

Integer sums do not depend on their order, so neither does the result, and a checksum proves them:
the numbers that came out must have the sum of the checksums, modulo 2^32. (The idea of THC, Li et
al. 2023, arXiv 2302.08545, without its rotation and its tables.)

L is 127, or less where the sum over ranks must fit the integers: int8 for up to 4 ranks (L of at
least 31; the error store makes good for the lost precision), int16 for up to 1057, then int32.
What a rank loses by rounding goes to its error store. The largest magnitude of a block with a NaN
or Inf is that, by the order of the bits: its elements decode to NaN on every rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device.kernels import Kernels, address, f32, pointer, size_t, u64
from ..errors import HpcsyncError
from .base import Floats, Form, Matrix, Moment, Settings, Store, SumCodec, divide
from .rounding import block_largest, block_scales, rounded, spread

BLOCK = 256
LEVELS = 127
LEAST_LEVELS = 31  # fewer take a wider integer


def sized(ranks: int) -> tuple[str, int]:
    """Integers that hold a sum over ``ranks`` ranks, and the largest number of one rank."""
    for dtype, most in (("int8", 127), ("int16", 32767)):
        levels = min(LEVELS, most // ranks)
        if levels >= LEAST_LEVELS:
            return dtype, levels
    return "int32", LEVELS


class SharedScale(SumCodec):
    """Sums of integers: the same bits in any order of the ranks."""

    name = "int8_shared"
    block = BLOCK
    replays = True

    def __init__(self, settings: Settings, kernels: Kernels | None = None) -> None:
        super().__init__(settings)
        self._maths = _Native(kernels) if kernels else _Reference()

    def forms(self, count: int, matrices: Sequence[Matrix], ranks: int) -> tuple[Form, ...]:
        maxima = Form("int32", -(-count // BLOCK), "max")
        numbers = Form(sized(ranks)[0], count)
        checksum = (Form("int64", 1),) if self.settings.verify else ()
        return (maxima, numbers, *checksum)

    def rounds(
        self,
        values: Floats,
        arrays: Sequence[NDArray[Any]],
        matrices: Sequence[Matrix],
        ranks: int,
        divisor: int,
        store: Store | None,
        moment: Moment,
    ) -> Iterator[int]:
        maxima, numbers = arrays[0], arrays[1]
        levels = sized(ranks)[1]
        error = None if store is None else store.arrays["error"]
        self._maths.largest(values, error, maxima)
        yield 0
        seed = moment.seed if self.settings.stochastic else None
        checksum = self._maths.encode(values, error, maxima, levels, seed, numbers)
        yield 1
        if self.settings.verify:
            arrays[2][0] = checksum
            yield 2
        total = self._maths.decode(numbers, maxima, levels, divisor, values)
        if self.settings.verify and (int(arrays[2][0]) - total) % (1 << 32):
            raise HpcsyncError(
                f"int8_shared: the sum over {ranks} ranks of a piece of {values.shape[0]} elements "
                f"fails its checksum in step {moment.step}: it was changed on its way"
            )


class _Reference:
    """In NumPy."""

    def largest(self, values: Floats, error: Floats | None, maxima: NDArray[Any]) -> None:
        if values.shape[0]:
            with np.errstate(all="ignore"):
                held = values if error is None else values + error
            maxima[:] = block_largest(held, BLOCK).view(np.int32)

    def encode(
        self,
        values: Floats,
        error: Floats | None,
        maxima: NDArray[Any],
        levels: int,
        seed: int | None,
        numbers: NDArray[Any],
    ) -> int:
        """Fill ``numbers`` and the error store; the numbers' sum modulo 2^32."""
        count = values.shape[0]
        scale, inverse = (
            spread(each, BLOCK, count) for each in block_scales(maxima.view(np.uint32), levels)
        )
        fine = np.isfinite(scale)
        with np.errstate(all="ignore"):
            held = values if error is None else values + error
            scaled = np.where(fine, held * inverse, np.float32(0))
            whole = np.clip(rounded(scaled, seed), -levels, levels)
            if error is not None:
                error[:] = np.where(fine, held - whole * scale, error)
        numbers[:] = whole.astype(numbers.dtype)
        return _checksum(numbers)

    def decode(
        self, numbers: NDArray[Any], maxima: NDArray[Any], levels: int, divisor: int, out: Floats
    ) -> int:
        """The sum over ranks, divided, to ``out``; the numbers' sum modulo 2^32."""
        scale, _ = block_scales(maxima.view(np.uint32), levels)
        with np.errstate(all="ignore"):
            np.multiply(numbers.astype(np.float32), spread(scale, BLOCK, out.shape[0]), out=out)
            if divisor != 1:
                divide(out, divisor)
        return _checksum(numbers)


class _Native:
    """By the kernels of cuda/cpu/integers.cpp; the methods are those of the reference."""

    def __init__(self, kernels: Kernels) -> None:
        self._largest = kernels.function("shared_maxima", None, address, address, size_t, address)
        takes = (address, address, size_t, address, ctypes.c_int32, ctypes.c_int, u64, address)
        gives = (address, size_t, address, ctypes.c_int32, f32, address)
        self._encode, self._decode = {}, {}
        for bits in (8, 16, 32):
            name = np.dtype(f"int{bits}")
            self._encode[name] = kernels.function(f"shared_encode_i{bits}", ctypes.c_uint32, *takes)
            self._decode[name] = kernels.function(f"shared_decode_i{bits}", ctypes.c_uint32, *gives)

    def largest(self, values: Floats, error: Floats | None, maxima: NDArray[Any]) -> None:
        self._largest(pointer(values), pointer(error), values.shape[0], pointer(maxima))

    def encode(
        self,
        values: Floats,
        error: Floats | None,
        maxima: NDArray[Any],
        levels: int,
        seed: int | None,
        numbers: NDArray[Any],
    ) -> int:
        chance = (0, 0) if seed is None else (1, seed)
        return int(
            self._encode[numbers.dtype](
                pointer(values),
                pointer(error),
                values.shape[0],
                pointer(maxima),
                levels,
                *chance,
                pointer(numbers),
            )
        )

    def decode(
        self, numbers: NDArray[Any], maxima: NDArray[Any], levels: int, divisor: int, out: Floats
    ) -> int:
        return int(
            self._decode[numbers.dtype](
                pointer(numbers), out.shape[0], pointer(maxima), levels, divisor, pointer(out)
            )
        )


def _checksum(numbers: NDArray[Any]) -> int:
    return int(numbers.sum(dtype=np.int64)) % (1 << 32)
