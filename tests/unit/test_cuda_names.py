"""What is called of CuPy and of torch.cuda is there, and takes what it is given. No GPU is needed:
both can be imported without one.
"""

from __future__ import annotations

import importlib
import inspect
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from hpcsync import nvrtc
from hpcsync.device import cuda_compile, cuda_modules

CUPY = "CuPy is missing: pip install cupy-cuda12x (or cupy-cuda13x)"
# Parameters in order, as CuPy's compiled functions tell them in the first line of their text.
RUNTIME = {
    "memcpyAsync": ("dst", "src", "size", "kind", "stream"),
    "memsetAsync": ("ptr", "value", "size", "stream"),
    "getDevice": (),
    "setDevice": ("device",),
    "getDeviceCount": (),
    "getDeviceProperties": ("device",),
    "deviceGetPCIBusId": ("device",),
    "deviceGetByPCIBusId": ("pci_bus_id",),
    "deviceCanAccessPeer": ("device", "peerDevice"),
    "malloc": ("size",),
    "free": ("ptr",),
    "ipcGetMemHandle": ("devPtr",),
    "ipcOpenMemHandle": ("handle", "flags"),
    "ipcCloseMemHandle": ("devPtr",),
    "runtimeGetVersion": (),
    "driverGetVersion": (),
}
NVRTC = {
    "getVersion": (),
    "getSupportedArchs": (),
    "createProgram": ("src", "name", "headers", "include_names"),
    "compileProgram": ("prog", "options"),
    "getCUBIN": ("prog",),
    "getPTX": ("prog",),
    "getProgramLog": ("prog",),
    "destroyProgram": ("prog",),
}
CUDA = {
    "alloc_pinned_memory": ("size",),
    "UnownedMemory": ("ptr", "size", "owner", "device_id"),
    "MemoryPointer": ("mem", "offset"),
    "Device": ("device",),
    "get_current_stream": ("device_id",),
    "get_elapsed_time": ("start_event", "end_event"),
}
ADDRESS = 1 << 44
TORCH = {
    "Event": ("enable_timing", "blocking", "interprocess"),
    "Stream": ("device", "priority"),
    "stream": ("stream",),
    "current_stream": ("device",),
    "set_device": ("device",),
    "get_device_properties": ("device",),
    "mem_get_info": ("device",),
    "max_memory_allocated": ("device",),
    "empty_cache": (),
    "set_sync_debug_mode": ("debug_mode",),
    "get_rng_state_all": (),
    "set_rng_state": ("new_state", "device"),
    "is_initialized": (),
}
METHODS = {
    "Event": ("record", "wait", "query", "synchronize", "elapsed_time", "ipc_handle"),
    "Stream": ("wait_event",),
}


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy", reason=CUPY)


def told(function: Any) -> tuple[str, ...]:
    """The names of a compiled function's parameters."""
    line = str(function.__doc__).partition("\n")[0]
    inside = line[line.index("(") + 1 : line.rindex(")")]
    parts = [each.partition("=")[0].split() for each in inside.split(",") if each.strip()]
    return tuple(each[-1] for each in parts)


@pytest.mark.parametrize("name", RUNTIME)
def test_runtime(cupy: Any, name: str) -> None:
    assert told(getattr(cupy.cuda.runtime, name)) == RUNTIME[name]


@pytest.mark.parametrize("name", NVRTC)
def test_nvrtc(cupy: Any, name: str) -> None:
    assert told(getattr(cupy.cuda.nvrtc, name)) == NVRTC[name]


@pytest.mark.parametrize("name", CUDA)
def test_cuda(cupy: Any, name: str) -> None:
    assert told(getattr(cupy.cuda, name)) == CUDA[name]


def test_errors_are_of_the_kinds_that_are_caught(cupy: Any) -> None:
    found = cupy.cuda
    kinds = found.runtime.CUDARuntimeError, found.nvrtc.NVRTCError, found.driver.CUDADriverError
    assert all(issubclass(each, RuntimeError) for each in kinds)
    assert found.runtime.CUDARuntimeError(2).status == 2
    assert found.runtime.memcpyDefault == 4


def test_streams_and_modules(cupy: Any) -> None:
    kind = cupy.cuda.Stream
    external = getattr(kind, "from_external", None) or cupy.cuda.ExternalStream.__init__
    assert tuple(inspect.signature(external).parameters)[-1] in ("obj", "device_id")
    assert told(cupy.cuda.function.Module.load)[-1] == "cubin"
    assert callable(cupy.cuda.function.Module().get_function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy tells that its library is not installed
        assert isinstance(importlib.import_module("cupy.cuda.nccl").available, bool)


def test_arrays_over_foreign_memory(cupy: Any) -> None:
    """Parts and views of memory that CuPy does not own, which it neither reads nor frees."""
    memory = cupy.cuda.UnownedMemory(ADDRESS, 64, object(), 0)
    whole = cupy.ndarray((64,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
    part = whole[4:20].view(np.float32)
    assert (part.shape, part.dtype, part.nbytes) == ((4,), np.float32, 16)
    assert part.data.ptr == ADDRESS + 4
    assert whole[8:8].view(np.dtype("uint16")).nbytes == 0
    assert whole.data.device_id == 0
    assert told(whole.data.memset)[-2:] == ("value", "size")
    assert told(whole.data.copy_from_device_async)[-3:] == ("src", "size", "stream")


def test_kernels_compile_by_cupys_nvrtc(cupy: Any) -> None:
    try:
        nvrtc.version(cupy)
    except RuntimeError:
        pytest.skip("NVRTC is missing: pip install nvidia-cuda-nvrtc")
    source, options = cuda_modules.source_of("entries"), cuda_modules.options()
    known = cupy.cuda.nvrtc.getSupportedArchs()
    assert {80, 90} <= set(known)
    for arch, begin in (("sm_90", b"\x7fELF"), ("compute_90", b"//")):
        words = (*options, f"--gpu-architecture={arch}")
        assert cuda_compile.compiled(cupy, "entries", source, words).startswith(begin)


@pytest.mark.parametrize("capability", ["80", "90"])
def test_architectures_are_compared_as_cupy_tells_them(cupy: Any, capability: str) -> None:
    try:
        nvrtc.version(cupy)
    except RuntimeError:
        pytest.skip("NVRTC is missing: pip install nvidia-cuda-nvrtc")
    device = types.SimpleNamespace(compute_capability=capability)
    cuda = types.SimpleNamespace(Device=lambda: device, nvrtc=cupy.cuda.nvrtc)
    assert cuda_compile.target(types.SimpleNamespace(cuda=cuda)) == f"sm_{capability}"


# -- torch ---------------------------------------------------------------------------------------


def parameters(function: Any) -> tuple[str, ...]:
    made = function.__new__ if inspect.isclass(function) else function
    names = tuple(inspect.signature(made).parameters)
    return names[1:] if inspect.isclass(function) else names


@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str) -> None:
    wanted = TORCH[name]
    found = parameters(getattr(torch.cuda, name))
    assert found[: len(wanted)] == wanted
    assert wanted or not found or name == "get_rng_state_all"


@pytest.mark.parametrize("kind", METHODS)
def test_methods_of_torch(kind: str) -> None:
    for name in METHODS[kind]:
        assert callable(getattr(getattr(torch.cuda, kind), name)), name
    handles = inspect.signature(torch.cuda.Event.from_ipc_handle).parameters
    assert tuple(handles) == ("device", "handle")


def test_ranges_and_errors_of_torch() -> None:
    assert tuple(inspect.signature(torch.cuda.nvtx.range_start).parameters) == ("msg",)
    assert tuple(inspect.signature(torch.cuda.nvtx.range_end).parameters)[:1] == ("range_id",)
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
