"""The kernels of ``cuda/gpu`` as CuPy loads them, compiled by NVRTC when first used."""

from __future__ import annotations

import functools
import hashlib
from contextlib import AbstractContextManager
from typing import Any

from . import cuda_compile
from .cuda_kernels import CudaKernels
from .cuda_launch import Launch, Launcher
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
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false")


def family_of(kernel: str) -> str:
    """The file of ``cuda/gpu`` that a kernel stands in."""
    return FAMILY_OF[kernel.split("_")[0]]


def source_of(family: str) -> str:
    """What NVRTC compiles for a family.

    It names a digest of all headers: compiled code is kept by this text, and that of an older
    header would else be taken.
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
def _module(device: int, family: str) -> Any:
    return cuda_compile.load(family, source_of(family), options())


def _function(device: int, kernel: str) -> Launch:
    function: Launch = _module(device, family_of(kernel)).get_function(kernel)
    return function


@functools.cache
def load(device: int) -> CudaKernels:
    """The kernels for the CUDA device of this number, which must be the current one in calls.

    Raises:
        DeviceError: in calls, that a kernel does not compile.
        ImportError: CuPy is missing.
    """
    import cupy

    processors = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
    return CudaKernels(Launcher(functools.partial(_function, device), int(processors)))


class _Foreign:
    """A stream of another library, as CUDA's stream protocol shows it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def on_stream(stream: int) -> AbstractContextManager[Any]:
    """A context in which calls go to a CUDA stream of the current device, given by its handle; any
    number of threads may be in it, any number of times."""
    import cupy

    kind = cupy.cuda.Stream
    made: AbstractContextManager[Any]
    if hasattr(kind, "from_external"):  # CuPy 14 on, where ExternalStream goes
        made = kind.from_external(_Foreign(stream))
    else:
        made = cupy.cuda.ExternalStream(stream)
    return made
