"""The GPU kernels of ``cuda/gpu``.

One method a function of ``cuda/hpcsync_kernels.h``, by its name without ``hpcsync_`` and with the
same bits; methods that serve several codecs take the codec's name. Arrays are given by their
addresses in device memory (``address_of``), so that torch's and CuPy's serve alike; what the
functions there return through a number is written to device memory. Nothing waits: a call puts
its kernels on CuPy's current stream (``on_stream`` makes that another library's) and returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .base import DType
from .cuda_launch import Address, Launcher, count, flag, pointer, pointers, seeded

# What adds each type; integers wrap, so that unsigned kernels serve signed ones.
SUMS = {
    "float32": "add_f32",
    "bfloat16": "add_bf16",
    "float16": "add_f16",
    "float64": "add_f64",
    "int8": "add_u8",
    "uint8": "add_u8",
    "int16": "add_u16",
    "int32": "add_u32",
    "int64": "add_u64",
    "int32 max": "add_max_i32",
}
ROW, ONEBIT_BLOCK = 256, 1024


class CudaKernels:
    """The functions of most families; see also ``cuda_sparse`` and ``cuda_factors``."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def _rows(self, name: str, n: int, *arguments: Any) -> None:
        self.launcher.warps(name, -(-n // ROW), *arguments)

    # ---- sums --------------------------------------------------------------------------------

    def add(
        self,
        dtype: str,
        outs: Sequence[Address],
        sources: Sequence[Address],
        n: int,
        divisor: float = 1.0,
    ) -> None:
        """``add_f32``, ``add_bf16`` or ``add_f16``; at most 64 outputs and 64 sources."""
        self._add(f"add_{dtype}", outs, sources, n, divisor)

    def reduce(
        self,
        dtype: DType,
        outs: Sequence[Address],
        sources: Sequence[Address],
        n: int,
        divisor: float = 1.0,
    ) -> None:
        """What ``Arithmetic.reduce`` does, of any type; at most 64 outputs and 64 sources."""
        assert divisor == 1 or dtype.floating, f"no mean of {dtype.name}"
        self._add(SUMS[dtype.name], outs, sources, n, divisor)

    def _add(
        self, name: str, outs: Sequence[Address], sources: Sequence[Address], n: int, by: float
    ) -> None:
        given = (pointers(outs), np.uint32(len(outs)), pointers(sources), np.uint32(len(sources)))
        self._rows(name, n, *given, count(n), np.float32(by))

    # ---- bf16, fp16, fp8, int8 ------------------------------------------------------------------

    def encode(
        self,
        codec: str,
        x: Address,
        error: Address | None,
        n: int,
        stochastic: bool,
        seed: int,
        out: Address,
    ) -> None:
        """``bf16_encode``, ``fp16_encode``, ``fp8_encode`` or ``int8_encode``."""
        drawn = (flag(stochastic), seeded(seed))
        self._rows(f"{codec}_encode", n, pointer(x), pointer(error), count(n), *drawn, pointer(out))

    def decode(self, codec: str, data: Address, n: int, out: Address) -> None:
        """The decode of any codec but the sparse ones."""
        self._decode(codec, "decode", data, n, out)

    def decode_add(self, codec: str, data: Address, n: int, out: Address) -> None:
        """The decode_add of any codec but the sparse ones."""
        self._decode(codec, "decode_add", data, n, out)

    def _decode(self, codec: str, what: str, data: Address, n: int, out: Address) -> None:
        block = ONEBIT_BLOCK if codec == "onebit" else ROW
        given = (pointer(data), count(n), pointer(out))
        self.launcher.warps(f"{codec}_{what}", -(-n // block), *given)

    def combine(
        self,
        codec: str,
        own: Address,
        place: int,
        others: Sequence[Address],
        n: int,
        divisor: float,
        error: Address | None,
        stochastic: bool,
        seed: int,
        out: Address,
    ) -> None:
        """``bf16_combine``, ``fp16_combine``, ``fp8_combine`` or ``int8_combine``."""
        sources = self._sources(own, place, others, n, divisor)
        drawn = (flag(stochastic), seeded(seed))
        self._rows(f"{codec}_combine", n, *sources, pointer(error), *drawn, pointer(out))

    def _sources(
        self, own: Address, place: int, others: Sequence[Address], n: int, divisor: float
    ) -> tuple[Any, ...]:
        ranks = (np.uint32(place), pointers(others), np.uint32(len(others)))
        return pointer(own), *ranks, count(n), np.float32(divisor)

    # ---- integers with scales that all ranks share --------------------------------------------

    def shared_maxima(self, x: Address, error: Address | None, n: int, maxima: Address) -> None:
        """``shared_maxima``: bits of the largest magnitude of each block, int32."""
        self._rows("shared_maxima", n, pointer(x), pointer(error), count(n), pointer(maxima))

    def shared_encode(
        self,
        bits: int,
        x: Address,
        error: Address | None,
        n: int,
        maxima: Address,
        levels: int,
        stochastic: bool,
        seed: int,
        out: Address,
        checksum: Address,
    ) -> None:
        """``shared_encode_i8``, ``_i16`` or ``_i32``; adds to the uint32 at ``checksum``."""
        given = (pointer(x), pointer(error), count(n), pointer(maxima), np.int32(levels))
        drawn = (flag(stochastic), seeded(seed))
        self._rows(f"shared_encode_i{bits}", n, *given, *drawn, pointer(out), pointer(checksum))

    def shared_decode(
        self,
        bits: int,
        data: Address,
        n: int,
        maxima: Address,
        levels: int,
        divisor: float,
        out: Address,
        checksum: Address,
    ) -> None:
        """``shared_decode_i8``, ``_i16`` or ``_i32``; adds to the uint32 at ``checksum``."""
        given = (pointer(data), count(n), pointer(maxima), np.int32(levels), np.float32(divisor))
        self._rows(f"shared_decode_i{bits}", n, *given, pointer(out), pointer(checksum))

    # ---- int4 ----------------------------------------------------------------------------------

    def hadamard_f32(self, values: Address, blocks: int) -> None:
        """``hadamard_f32``: each block of 256 values, in place."""
        self.launcher.warps("hadamard_f32", blocks, pointer(values), count(blocks))

    def int4_pack(self, q: Address, n: int, out: Address) -> None:
        self._rows("int4_pack", n, pointer(q), count(n), pointer(out))

    def int4_unpack(self, data: Address, n: int, q: Address) -> None:
        self._rows("int4_unpack", n, pointer(data), count(n), pointer(q))

    def int4_encode(
        self,
        x: Address,
        error: Address | None,
        exponents: Address | None,
        keep: float,
        n: int,
        stochastic: bool,
        seed: int,
        out: Address,
    ) -> None:
        store = (pointer(error), pointer(exponents), np.float32(keep))
        drawn = (flag(stochastic), seeded(seed))
        self._rows("int4_encode", n, pointer(x), *store, count(n), *drawn, pointer(out))

    def int4_combine(
        self,
        own: Address,
        place: int,
        others: Sequence[Address],
        n: int,
        divisor: float,
        error: Address | None,
        exponents: Address | None,
        keep: float,
        stochastic: bool,
        seed: int,
        out: Address,
    ) -> None:
        sources = self._sources(own, place, others, n, divisor)
        store = (pointer(error), pointer(exponents), np.float32(keep))
        drawn = (flag(stochastic), seeded(seed))
        self._rows("int4_combine", n, *sources, *store, *drawn, pointer(out))

    # ---- onebit --------------------------------------------------------------------------------

    def onebit_encode(self, x: Address, error: Address | None, n: int, out: Address) -> None:
        given = (pointer(x), pointer(error), count(n), pointer(out))
        self.launcher.warps("onebit_encode", -(-n // ONEBIT_BLOCK), *given)

    def onebit_combine(
        self,
        own: Address,
        place: int,
        others: Sequence[Address],
        n: int,
        divisor: float,
        error: Address | None,
        out: Address,
    ) -> None:
        sources = self._sources(own, place, others, n, divisor)
        blocks = -(-n // ONEBIT_BLOCK)
        self.launcher.warps("onebit_combine", blocks, *sources, pointer(error), pointer(out))
