"""The GPU kernels by NVIDIA's compilers: nvcc, and NVRTC as devices call it. No GPU is needed.

Both come with a CUDA toolkit, and as wheels: pip install nvidia-cuda-nvcc nvidia-cuda-crt
nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-nvrtc.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hpcsync.device import cuda_modules, kernels

FAMILIES = sorted(set(cuda_modules.FAMILY_OF.values()))
ARCHITECTURES = ("80", "90")
TOOLKITS = ("/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib")


def wheel_folders() -> list[Path]:
    """Where NVIDIA's wheels lie: folders like nvidia/cu13."""
    found = importlib.util.find_spec("nvidia")
    places = found.submodule_search_locations if found else None
    return [each for place in places or () for each in sorted(Path(place).glob("c*"))]


@functools.cache
def find_nvcc() -> str | None:
    wheels = [str(folder / "bin" / "nvcc") for folder in wheel_folders()]
    return shutil.which("nvcc") or next(filter(shutil.which, wheels), None)


@functools.cache
def find_nvrtc() -> ctypes.CDLL | None:
    toolkits = [path for pattern in TOOLKITS for path in Path("/").glob(pattern.removeprefix("/"))]
    folders = [each for folder in wheel_folders() for each in (folder / "lib", folder)]
    for folder in [*folders, *toolkits]:
        for library in sorted(folder.glob("libnvrtc.so*")):
            try:
                return ctypes.CDLL(str(library))
            except OSError:
                continue
    return None


needs_nvcc = pytest.mark.skipif(
    find_nvcc() is None or shutil.which("g++") is None,
    reason="nvcc is missing: pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm "
    "nvidia-cuda-runtime (and a g++)",
)
needs_nvrtc = pytest.mark.skipif(
    find_nvrtc() is None, reason="NVRTC is missing: pip install nvidia-cuda-nvrtc"
)


def test_every_file_is_a_family() -> None:
    files = {path.stem for path in (kernels.source_folder() / "gpu").glob("*.cu")}
    assert files == set(FAMILIES)


@needs_nvcc
@pytest.mark.parametrize("family", FAMILIES)
def test_nvcc(tmp_path: Path, family: str) -> None:
    source = kernels.source_folder() / "gpu" / f"{family}.cu"
    words = [
        "-std=c++17",
        "-fmad=false",
        "-ftz=false",
        "-Werror",
        "all-warnings",
        "-fatbin",
        "--threads",
        "2",
    ]
    words += [f"-gencode=arch=compute_{each},code=sm_{each}" for each in ARCHITECTURES]
    done = subprocess.run(
        [str(find_nvcc()), *words, "-o", str(tmp_path / "out"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out").stat().st_size


def compile_by_nvrtc(family: str, architecture: str) -> str:
    """PTX of a family, with the source and the options of the device."""
    nvrtc = find_nvrtc()
    assert nvrtc is not None
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = cuda_modules.source_of(family).encode()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text, f"{family}.cu".encode(), 0, None, None
    )
    assert status == 0
    options = [*cuda_modules.options(), f"--gpu-architecture=compute_{architecture}"]
    words = (ctypes.c_char_p * len(options))(*[each.encode() for each in options])
    status = nvrtc.nvrtcCompileProgram(program, len(options), words)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    assert "warning" not in log.value.decode()
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.value.decode()


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nvrtc(family: str, architecture: str) -> None:
    ptx = compile_by_nvrtc(family, architecture)
    entries = re.findall(r"\.entry (\w+)", ptx)
    assert entries
    assert {cuda_modules.family_of(each) for each in entries} == {family}
    # Nothing that would give other bits than the reference.
    assert not re.findall(r"\b(?:fma|mad|\w+\.ftz|\w+\.approx)\.\S*f32", ptx)
    assert not re.findall(r"\.(?:ftz|approx)\b", ptx)


def test_source_changes_with_a_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is kept by the text that was given, which includes no headers."""
    folder = tmp_path / "cuda"
    shutil.copytree(kernels.source_folder(), folder)
    monkeypatch.setattr(cuda_modules, "source_folder", lambda: folder)
    before = cuda_modules.source_of("sums")
    assert cuda_modules.source_of("sums") == before
    (folder / "hpcsync_block.h").write_text("changed")
    assert cuda_modules.source_of("sums") != before
