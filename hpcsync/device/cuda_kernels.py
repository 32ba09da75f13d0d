"""The GPU kernels of ``cuda/gpu``, compiled by NVRTC through CuPy when first used.

One method a function of ``cuda/hpcsync_kernels.h``, by its name without ``hpcsync_`` and with the
same bits; methods that serve several codecs take the codec's name. Arrays are given by their
addresses in device memory (``address_of``), so that torch's and CuPy's serve alike; what the
functions there return through a number is written to device memory. Nothing waits: a call puts
its kernels on CuPy's current stream (``on_stream`` makes that another library's) and returns.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from .kernels import source_folder

# By the first word of a kernel's name.
FAMILY_OF = {
    "add": "sums",
    "bf16": "floats",
    "fp16": "floats",
    "fp8": "floats",
    "int8": "integers",
    "shared": "integers",
    "hadamard": "int4",
    "int4": "int4",
    "onebit": "onebit",
    "sparse": "sparse",
    "entries": "entries",
    "groups": "entries",
    "factor": "factors",
    "orthogonalise": "factors",
}
# The same bits as everywhere else; --use_fast_math must never join these.
OPTIONS = ("--std=c++17", "--fmad=false")
THREADS = 256  # of a thread block, as cuda/gpu/gpu.h declares
WARPS = THREADS // 32
RESIDENT = 8  # thread blocks that a multiprocessor holds at once
MOST_ARRAYS = 64  # HPCSYNC_GPU_POINTERS
ROW, ONEBIT_BLOCK = 256, 1024

Address = int
Launch = Callable[[tuple[int], tuple[int], tuple[Any, ...]], None]

_POINTERS = np.dtype([("at", np.uint64, (MOST_ARRAYS,))])


def address_of(array: Any) -> Address:
    """Where a contiguous CUDA array of CuPy, torch or any other library begins."""
    interface = array.__cuda_array_interface__
    assert interface.get("strides") is None, "kernels take contiguous arrays"
    return int(interface["data"][0])


def pointer(address: Address | None) -> np.uint64:
    """An address as a kernel's argument; None is NULL."""
    return np.uint64(address or 0)


def pointers(addresses: Sequence[Address]) -> np.ndarray[Any, Any]:
    """Addresses as one argument, passed by value.

    Raises:
        ValueError: there are too many.
    """
    if len(addresses) > MOST_ARRAYS:
        raise ValueError(f"a kernel takes at most {MOST_ARRAYS} arrays at once: {len(addresses)}")
    made = np.zeros(1, _POINTERS)
    made["at"][0, : len(addresses)] = addresses
    return made


def count(n: int) -> np.uint64:
    return np.uint64(n)


def seeded(seed: int) -> np.uint64:
    return np.uint64(seed & ((1 << 64) - 1))


def flag(value: bool) -> np.int32:
    return np.int32(value)


class Launcher:
    """Starts kernels with as many thread blocks as their work asks for and the device holds.

    Args:
        function: the kernel of a name, as CuPy's RawKernel is called.
        processors: multiprocessors of the device.
    """

    def __init__(self, function: Callable[[str], Launch], processors: int) -> None:
        self._function = functools.cache(function)
        self._most = processors * RESIDENT

    def warps(self, name: str, warps: int, *arguments: Any) -> None:
        """Start a kernel in which each warp takes a part of the work; nothing for no part."""
        self.blocks(name, -(-warps // WARPS), *arguments)

    def threads(self, name: str, threads: int, *arguments: Any) -> None:
        """Start a kernel in which each thread takes a part."""
        self.blocks(name, -(-threads // THREADS), *arguments)

    def blocks(self, name: str, blocks: int, *arguments: Any) -> None:
        """Start a kernel in which each thread block takes a part."""
        if blocks:
            self._function(name)((min(blocks, self._most),), (THREADS,), arguments)


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
        given = (pointers(outs), np.uint32(len(outs)), pointers(sources), np.uint32(len(sources)))
        self._rows(f"add_{dtype}", n, *given, count(n), np.float32(divisor))

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


# ---- CuPy --------------------------------------------------------------------------------------


def family_of(kernel: str) -> str:
    """The file of ``cuda/gpu`` that a kernel stands in."""
    return FAMILY_OF[kernel.split("_")[0]]


def source_of(family: str) -> str:
    """What NVRTC compiles for a family.

    It names a digest of all headers: CuPy keeps compiled code by the text that it is given, and
    would else take that of an older header.
    """
    folder = source_folder()
    digest = hashlib.sha256()
    for header in sorted([*folder.glob("*.h"), *folder.glob("gpu/*.h")]):
        digest.update(header.read_bytes())
    return f"// {digest.hexdigest()}\n{(folder / 'gpu' / f'{family}.cu').read_text()}"


def options() -> tuple[str, ...]:
    """NVRTC's options."""
    folder = source_folder()
    return (*OPTIONS, f"-I{folder / 'gpu'}", f"-I{folder}")


@functools.cache
def _module(family: str) -> Any:
    import cupy

    return cupy.RawModule(code=source_of(family), options=options(), backend="nvrtc")


def _function(kernel: str) -> Launch:
    function: Launch = _module(family_of(kernel)).get_function(kernel)
    return function


@functools.cache
def load(device: int) -> CudaKernels:
    """The kernels for the CUDA device of this number, which must be the current one in calls.

    Raises:
        ImportError: CuPy is missing.
    """
    import cupy

    processors = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
    return CudaKernels(Launcher(_function, int(processors)))


def on_stream(stream: int) -> AbstractContextManager[Any]:
    """A context in which calls go to a CUDA stream, given by its handle."""
    import cupy

    made: AbstractContextManager[Any] = cupy.cuda.ExternalStream(stream)
    return made
