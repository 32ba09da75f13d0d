"""CUDA code from source, by NVRTC, and kept in the user's cache folder.

Not by CuPy's RawModule, which adds ``-ftz=true`` after all options, so that subnormal numbers
would be taken for zero. What is kept is known by its source, the options, NVRTC's version and the
architecture; a file that is damaged or that the driver refuses counts as none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import cache_files
from ..errors import DeviceError
from ..nvrtc import version as nvrtc_version

_DIGEST = hashlib.sha256().digest_size


def load(name: str, source: str, options: Sequence[str], folder: Path | None = None) -> Any:
    """CuPy's module of a source on the calling thread's device.

    Args:
        name: of the source, for messages.
        folder: of kept code; that of the user if not given.

    Raises:
        DeviceError: it does not compile, or the driver does not take it.
        ImportError: CuPy is missing.
    """
    import cupy

    version = nvrtc_version(cupy)
    words = (*options, f"--gpu-architecture={target(cupy)}")
    told = repr((source, words, version))
    digest = hashlib.sha256(told.encode()).hexdigest()
    path = (folder or cache_files.folder()) / "kernels" / f"{name}-{digest[:32]}"
    if code := _read(path):
        try:
            return _module(cupy, code)
        except RuntimeError:
            pass  # compiled anew
    code = compiled(cupy, name, source, words)
    cache_files.write(path, hashlib.sha256(code).digest() + code)
    try:
        return _module(cupy, code)
    except RuntimeError as error:
        raise DeviceError(
            f"the driver does not take the GPU kernels of {name} ({_line(str(error))}): update "
            "the driver, or use train.device=cpu"
        ) from None


def target(cupy: Any) -> str:
    """The architecture to compile for: the device's, or the last one before that NVRTC knows, in a
    form that the driver translates."""
    own = int(cupy.cuda.Device().compute_capability)
    known = [int(each) for each in cupy.cuda.nvrtc.getSupportedArchs()]
    if own in known:
        return f"sm_{own}"
    return f"compute_{max((each for each in known if each < own), default=own)}"


def compiled(cupy: Any, name: str, source: str, words: Sequence[str]) -> bytes:
    """What NVRTC makes of a source.

    Raises:
        DeviceError: there are errors in it, or NVRTC does not know an option.
    """
    nvrtc = cupy.cuda.nvrtc
    program = nvrtc.createProgram(source, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, words)
        exact = words[-1].partition("=")[2].startswith("sm_")
        made: bytes = nvrtc.getCUBIN(program) if exact else nvrtc.getPTX(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program) or str(error)
        version = ".".join(str(each) for each in nvrtc.getVersion())
        raise DeviceError(
            f"the GPU kernels of {name} do not compile by NVRTC {version} ({_line(log)}): install "
            "the CuPy and the NVRTC of torch's CUDA, or use train.device=cpu"
        ) from None
    finally:
        nvrtc.destroyProgram(program)
    return made


def _read(path: Path) -> bytes:
    """Kept code; empty if there is none or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return b""
    code = data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == data[:_DIGEST] else b""


def _module(cupy: Any, code: bytes) -> Any:
    module = cupy.cuda.function.Module()
    module.load(code)
    return module


def _line(text: str) -> str:
    """The first line that tells an error, or the first of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), (lines or ["unknown"])[0])
