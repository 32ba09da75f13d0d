"""How the GPU kernels are found, compiled and started, with a stand-in for CuPy."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcsync.device import cuda_compile, cuda_launch, cuda_modules, cuda_sparse, kernels
from hpcsync.device.cuda_kernels import CudaKernels
from hpcsync.device.cuda_launch import Launcher
from hpcsync.errors import DeviceError


class Recorder:
    """Stands for a device: keeps what was started."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, tuple[Any, ...]]] = []
        self.found: list[str] = []

    def function(self, name: str) -> cuda_launch.Launch:
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


class NVRTCError(RuntimeError):
    """As CuPy's."""


class Nvrtc:
    """A compiler that notes what it is given: code is the target and the source."""

    NVRTCError = NVRTCError

    def __init__(self) -> None:
        self.known, self.log = (80, 90), ""
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        self.programs: dict[int, str] = {}

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        return 12, 9

    def getSupportedArchs(self) -> tuple[int, ...]:  # noqa: N802
        return self.known

    def createProgram(self, src: str, name: str, headers: Any, names: Any) -> int:  # noqa: N802
        assert (headers, names) == ((), ())
        self.programs[len(self.compiled) + 1] = src
        return len(self.compiled) + 1

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:  # noqa: N802
        self.compiled.append((self.programs[program], options))
        if self.log:
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def getProgramLog(self, program: int) -> str:  # noqa: N802
        return self.log

    def getCUBIN(self, program: int) -> bytes:  # noqa: N802
        return b"cubin " + self.programs[program].encode()

    def getPTX(self, program: int) -> bytes:  # noqa: N802
        return b"ptx " + self.programs[program].encode()

    def destroyProgram(self, program: int) -> None:  # noqa: N802
        del self.programs[program]


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.SimpleNamespace]:
    """A module named cupy that keeps what it was asked to compile, and the code it loaded."""
    loaded: list[bytes] = []
    refused: list[bytes] = []

    class Module:
        def load(self, code: bytes) -> None:
            if code in refused:
                raise RuntimeError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
            loaded.append(code)

        def get_function(self, name: str) -> Any:
            return lambda grid, block, arguments: None

    device = types.SimpleNamespace(attributes={"MultiProcessorCount": 132}, compute_capability="90")
    cuda = types.SimpleNamespace(
        Device=lambda number=0: device,
        Stream=object,
        ExternalStream=lambda at: ("on", at),
        nvrtc=Nvrtc(),
        function=types.SimpleNamespace(Module=Module),
    )
    module = types.SimpleNamespace(cuda=cuda, device=device, loaded=loaded, refused=refused)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda_modules._module.cache_clear()
    cuda_modules.load.cache_clear()
    yield module
    cuda_modules._module.cache_clear()
    cuda_modules.load.cache_clear()


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
    assert others.nbytes == 8 * cuda_launch.MOST_ARRAYS


def test_too_many_arrays_are_refused(gpu: CudaKernels, device: Recorder) -> None:
    with pytest.raises(ValueError, match="at most 64 arrays at once: 65"):
        gpu.add("f32", [8], [8] * 65, 1)
    assert not device.calls


def test_table_is_as_long_as_the_kernels_say() -> None:
    text = (kernels.source_folder() / "gpu" / "gpu.h").read_text()
    assert f"#define HPCSYNC_GPU_POINTERS {cuda_launch.MOST_ARRAYS}\n" in text
    assert f"__launch_bounds__({cuda_launch.THREADS})" in text


def test_sparse_coding_of_nothing_starts_nothing(device: Recorder) -> None:
    sparse = cuda_sparse.CudaSparse(Launcher(device.function, processors=2))
    sparse.decode(8, 0, 16, 24)
    sparse.groups_put(8, 0, 0, 1, 1, 1, 16)
    assert not device.calls


def test_arrays_must_be_contiguous() -> None:
    array = types.SimpleNamespace(__cuda_array_interface__={"data": (64, False), "strides": (8,)})
    with pytest.raises(AssertionError, match="contiguous"):
        cuda_launch.address_of(array)
    array.__cuda_array_interface__["strides"] = None
    assert cuda_launch.address_of(array) == 64


def test_families_are_compiled_when_first_used_and_once(cupy: types.SimpleNamespace) -> None:
    gpu = cuda_modules.load(0)
    assert cuda_modules.load(0) is gpu
    compiled = cupy.cuda.nvrtc.compiled
    assert not compiled
    for _ in range(2):
        gpu.decode("int8", 8, 1, 16)
        gpu.shared_maxima(8, None, 1, 16)
        gpu.onebit_encode(8, None, 1, 16)
    assert len(compiled) == 2
    source, options = compiled[0]
    assert source == cuda_modules.source_of("integers")
    assert options == (*cuda_modules.options(), "--gpu-architecture=sm_90")
    assert not cupy.cuda.nvrtc.programs, "given back"


def test_subnormal_numbers_are_kept() -> None:
    assert {"--fmad=false", "--ftz=false"} <= set(cuda_modules.options())
    assert not any("fast" in option for option in cuda_modules.options())


def test_code_is_compiled_once_for_all_jobs(
    cupy: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc = cupy.cuda.nvrtc
    for times, change in enumerate(
        (
            lambda: None,
            lambda: monkeypatch.setattr(nvrtc, "getVersion", lambda: (13, 0)),
            lambda: setattr(cupy.device, "compute_capability", "80"),
        ),
        1,
    ):
        change()
        for _ in range(2):
            cuda_compile.load("sums", "text", ("--one",))
        assert len(nvrtc.compiled) == times
    assert len(cupy.loaded) == 6
    cuda_compile.load("sums", "text", ("--two",))
    cuda_compile.load("sums", "other", ("--two",))
    assert len(nvrtc.compiled) == 5


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_damaged_code_is_compiled_anew(
    cupy: types.SimpleNamespace, tmp_path: Path, damage: bytes | None
) -> None:
    cuda_compile.load("sums", "text", ())
    (path,) = tmp_path.glob("hpcsync/kernels/*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if damage is None else damage)
    cuda_compile.load("sums", "text", ())
    assert cupy.loaded == [b"cubin text"] * 2
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_not_missed(
    cupy: types.SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cuda_compile.load("sums", "text", (), tmp_path / "file")
    assert cupy.loaded == [b"cubin text"]


@pytest.mark.parametrize(
    ("capability", "wanted"), [("80", "sm_80"), ("89", "compute_80"), ("130", "compute_90")]
)
def test_a_device_that_the_compiler_does_not_know(
    cupy: types.SimpleNamespace, capability: str, wanted: str
) -> None:
    cupy.device.compute_capability = capability
    cuda_compile.load("sums", "text", ())
    assert cupy.cuda.nvrtc.compiled[0][1] == (f"--gpu-architecture={wanted}",)
    assert cupy.loaded[0].startswith(b"cubin" if wanted.startswith("sm") else b"ptx")


def test_errors_of_the_compiler_and_of_the_driver(cupy: types.SimpleNamespace) -> None:
    cupy.cuda.nvrtc.log = "a note\nsums.cu(3): error: no such thing\n  here\n"
    with pytest.raises(DeviceError) as caught:
        cuda_compile.load("sums", "text", ())
    assert str(caught.value) == (
        "the GPU kernels of sums do not compile by NVRTC 12.9 (sums.cu(3): error: no such thing): "
        "install the CuPy and the NVRTC of torch's CUDA, or use train.device=cpu"
    )
    assert not cupy.cuda.nvrtc.programs
    cupy.cuda.nvrtc.log = ""
    cupy.refused.append(b"cubin text")
    with pytest.raises(DeviceError, match=r"image is invalid\): update the driver, or"):
        cuda_compile.load("sums", "text", ())


def test_stream_of_another_library(cupy: types.SimpleNamespace) -> None:
    assert cuda_modules.on_stream(1234) == ("on", 1234)
