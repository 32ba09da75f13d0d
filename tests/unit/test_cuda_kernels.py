"""How the GPU kernels are found, compiled and started, with a stand-in for CuPy."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hpcsync.device import cuda_kernels, cuda_sparse, kernels
from hpcsync.device.cuda_kernels import CudaKernels, Launcher


class Recorder:
    """Stands for a device: keeps what was started."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, tuple[Any, ...]]] = []
        self.found: list[str] = []

    def function(self, name: str) -> cuda_kernels.Launch:
        self.found.append(name)

        def start(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            self.calls.append((name, grid[0], block[0], arguments))

        return start


@pytest.fixture
def device() -> Recorder:
    return Recorder()


@pytest.fixture
def gpu(device: Recorder) -> CudaKernels:
    return CudaKernels(Launcher(device.function, processors=2))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A module named cupy that keeps the modules it was asked to compile."""
    compiled: list[dict[str, Any]] = []

    class RawModule:
        def __init__(self, **given: Any) -> None:
            compiled.append(given)

        def get_function(self, name: str) -> Any:
            return lambda grid, block, arguments: None

    device = types.SimpleNamespace(attributes={"MultiProcessorCount": 132})
    cuda = types.SimpleNamespace(Device=lambda number: device, ExternalStream=lambda at: ("on", at))
    module = types.SimpleNamespace(RawModule=RawModule, cuda=cuda, compiled=compiled)
    monkeypatch.setitem(sys.modules, "cupy", module)
    cuda_kernels._module.cache_clear()
    cuda_kernels.load.cache_clear()
    yield module
    cuda_kernels._module.cache_clear()
    cuda_kernels.load.cache_clear()


def test_grid_fits_the_work_up_to_what_the_device_holds(gpu: CudaKernels, device: Recorder) -> None:
    for n in (0, 1, 8 * 256, 8 * 256 + 1, 10**9):
        gpu.decode("int8", 64, n, 128)
    assert [(grid, block) for _, grid, block, _ in device.calls] == [
        (1, 256),
        (1, 256),
        (2, 256),
        (16, 256),
    ]
    assert device.found == ["int8_decode"], "looked up once"


def test_arguments_have_the_kernels_types(gpu: CudaKernels, device: Recorder) -> None:
    gpu.combine("int8", 8, 1, [16, 24], 300, 3, None, True, (1 << 64) + 5, 32)
    ((name, _, _, arguments),) = device.calls
    own, place, others, n_others, n, divisor, error, stochastic, seed, out = arguments
    assert name == "int8_combine"
    assert [type(each) for each in (own, n, error, seed, out)] == [np.uint64] * 5
    assert [type(each) for each in (place, n_others)] == [np.uint32] * 2
    assert (type(divisor), type(stochastic)) == (np.float32, np.int32)
    assert (own, place, n_others, n, divisor) == (8, 1, 2, 300, 3)
    assert (error, stochastic, seed, out) == (0, 1, 5, 32), "NULL is 0; seeds have 64 bits"
    assert others["at"][0, :3].tolist() == [16, 24, 0]
    assert others.nbytes == 8 * cuda_kernels.MOST_ARRAYS


def test_too_many_arrays_are_refused(gpu: CudaKernels, device: Recorder) -> None:
    with pytest.raises(ValueError, match="at most 64 arrays at once: 65"):
        gpu.add("f32", [8], [8] * 65, 1)
    assert not device.calls


def test_table_is_as_long_as_the_kernels_say() -> None:
    text = (kernels.source_folder() / "gpu" / "gpu.h").read_text()
    assert f"#define HPCSYNC_GPU_POINTERS {cuda_kernels.MOST_ARRAYS}\n" in text
    assert f"__launch_bounds__({cuda_kernels.THREADS})" in text


def test_sparse_coding_of_nothing_starts_nothing(device: Recorder) -> None:
    sparse = cuda_sparse.CudaSparse(Launcher(device.function, processors=2))
    sparse.decode(8, 0, 16, 24)
    sparse.groups_put(8, 0, 0, 1, 1, 1, 16)
    assert not device.calls


def test_arrays_must_be_contiguous() -> None:
    array = types.SimpleNamespace(__cuda_array_interface__={"data": (64, False), "strides": (8,)})
    with pytest.raises(AssertionError, match="contiguous"):
        cuda_kernels.address_of(array)
    array.__cuda_array_interface__["strides"] = None
    assert cuda_kernels.address_of(array) == 64


def test_families_are_compiled_when_first_used_and_once(cupy: types.SimpleNamespace) -> None:
    gpu = cuda_kernels.load(0)
    assert cuda_kernels.load(0) is gpu
    assert not cupy.compiled
    for _ in range(2):
        gpu.decode("int8", 8, 1, 16)
        gpu.shared_maxima(8, None, 1, 16)
        gpu.onebit_encode(8, None, 1, 16)
    assert len(cupy.compiled) == 2
    given = cupy.compiled[0]
    assert given["code"] == cuda_kernels.source_of("integers")
    assert given["backend"] == "nvrtc"
    assert "--fmad=false" in given["options"]
    assert not any("fast" in option for option in given["options"])


def test_stream_of_another_library(cupy: types.SimpleNamespace) -> None:
    assert cuda_kernels.on_stream(1234) == ("on", 1234)
