"""NVRTC for CuPy: before version 14 it looks for it only where the system's linker does, and not
in the wheel that torch for CUDA brings along.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
from pathlib import Path
from typing import Any


def version(cupy: Any) -> tuple[int, ...]:
    """The version of the NVRTC that CuPy compiles by; loaded from NVIDIA's wheel, if it has to be.

    Raises:
        RuntimeError: there is none; CuPy's own, which names the library.
    """
    try:
        return tuple(cupy.cuda.nvrtc.getVersion())
    except RuntimeError as error:
        names = re.findall(r"libnvrtc\.so\.\d+", str(error))
        if not any(map(_load, names)):
            raise
    return tuple(cupy.cuda.nvrtc.getVersion())


def _load(name: str) -> bool:
    """Load a library out of a wheel; who asks the linker for it by name is then given that one."""
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations if found else None) or ():
        for path in sorted(Path(place).glob(f"*/lib/{name}")):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(path))
                return True
    return False
