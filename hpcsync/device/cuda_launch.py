"""What kernels are started with: their arguments, and how many thread blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

THREADS = 256  # of a thread block, as cuda/gpu/gpu.h declares
WARPS = THREADS // 32
RESIDENT = 8  # thread blocks that a multiprocessor holds at once
MOST_ARRAYS = 64  # HPCSYNC_GPU_POINTERS

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
        function: the kernel of a name, as CuPy's functions are called.
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
