"""The native CPU kernels: a C library beside the package, loaded with ctypes.

The library is built when the package is installed, if there is a C++ compiler. Without it every
caller has a NumPy form of the same bits, only slower. ``cuda/hpcsync_kernels.h`` documents the
functions; a call releases the interpreter lock.

A program in another language finds that header and this library by

    python -c "import hpcsync.device.kernels as k; print(k.include_folder(), k.LIBRARY)"
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ABI_VERSION = 1
PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = PACKAGE / "libhpcsync_kernels.so"
HEADER = "hpcsync_kernels.h"

size_t, u64, f32, address = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_float, ctypes.c_void_p


class Kernels:
    """The functions of the library by name, without its prefix ``hpcsync_``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def function(self, name: str, result: Any, *parameters: Any) -> Any:
        """A function with its C types; ``address`` stands for any pointer."""
        found = getattr(self._library, f"hpcsync_{name}")
        found.restype = result
        found.argtypes = list(parameters)
        return found

    @property
    def isa(self) -> str:
        """The instruction set in use: avx512, avx2 or plain."""
        text: bytes = self.function("isa", ctypes.c_char_p)()
        return text.decode()

    def use_isa(self, name: str) -> bool:
        """Choose another instruction set; False if the processor lacks it."""
        return bool(self.function("use_isa", ctypes.c_int, ctypes.c_char_p)(name.encode()) == 0)


@functools.cache
def load() -> Kernels | None:
    """The library, or None where it was not built or belongs to another version."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = library.hpcsync_abi_version()
    except (OSError, AttributeError):
        return None
    return Kernels(library) if version == ABI_VERSION else None


def missing() -> str:
    """Why there are no native kernels, in one line; empty if there are."""
    if load() is not None:
        return ""
    what = "are of another version" if LIBRARY.exists() else "were not built"
    checkout = PACKAGE.parent
    source = f"-e {checkout}" if (checkout / "setup.py").is_file() else "--force-reinstall hpcsync"
    return (
        f"the native kernels {what}: sums and codecs run in NumPy, which is slower; install a C++ "
        "compiler (Debian, Ubuntu: apt-get install g++) and run: "
        f"{sys.executable} -m pip install --no-deps {source}"
    )


def source_folder() -> Path:
    """The native sources: in the package where it was installed, else beside it in a checkout.

    Raises:
        FileNotFoundError: if neither has them.
    """
    for folder in (PACKAGE / "cuda", PACKAGE.parent / "cuda"):
        if (folder / HEADER).is_file():
            return folder
    raise FileNotFoundError(f"hpcsync's native sources are missing: no cuda/{HEADER} by {PACKAGE}")


def include_folder() -> Path:
    """Where a C compiler finds ``hpcsync_kernels.h``."""
    return source_folder()


def pointer(array: NDArray[Any] | None) -> int | None:
    """The address of a contiguous array's first element, for ``address``; None for NULL."""
    if array is None:
        return None
    assert array.flags.c_contiguous, "kernels take contiguous arrays"
    return int(array.ctypes.data)


def pointers(arrays: Sequence[NDArray[Any]]) -> Any:
    """A C array of the arrays' addresses; it must be kept while the call runs."""
    return (ctypes.c_void_p * max(len(arrays), 1))(*[pointer(each) for each in arrays])


def empty_bytes(count: int) -> NDArray[np.uint8]:
    """Uninitialised bytes on a cache line's boundary, as kernels like them."""
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count]
