"""Why CUDA cannot be used, in one line with the fix: each fault by a fake of what is not here."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcsync import cuda_state
from hpcsync.cuda_state import EXCLUSIVE, PROHIBITED, CudaState, Gpu
from hpcsync.errors import DeviceError
from tests.doctor import module

H100 = Gpu("H100", "aa")
GOOD = CudaState(
    driver=13000,
    gpus=(H100,),
    torch="2.11.0",
    torch_cuda="13.0",
    cupy="13.6.0",
    cupy_cuda=13000,
    packages=("cupy-cuda13x",),
)
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no driver": ({"driver": 0, "gpus": ()}, "no NVIDIA driver is here", "train.device=cpu"),
    "no GPU": ({"fault": 100, "gpus": ()}, "finds no GPU", "nvidia-smi"),
    "hidden": (
        {"fault": 100, "gpus": (), "visible": ""},
        "CUDA_VISIBLE_DEVICES='' names no GPU",
        "unset it",
    ),
    "driver of two versions": ({"fault": 803, "gpus": ()}, "of different versions", "restart"),
    "driver that fails": ({"fault": 42, "gpus": ()}, "does not start (error 42)", "train.device"),
    "torch for CPUs": ({"torch_cuda": ""}, "is a build for CPUs only", "install its build"),
    "driver older than the runtime": (
        {"driver": 12040},
        "the NVIDIA driver runs CUDA 12.4 at most, but torch 2.11.0 is for CUDA 13.0",
        "update the driver, or install torch's build for CUDA 12",
    ),
    "no CuPy": (
        {"cupy": "", "cupy_cuda": 0, "packages": ()},
        "CuPy is missing",
        "`pip install cupy-cuda13x`",
    ),
    "CuPy for another CUDA": (
        {"cupy_cuda": 12090, "packages": ("cupy-cuda12x",)},
        "CuPy 13.6.0 is for CUDA 12, but torch 2.11.0 for CUDA 13.0",
        "`pip uninstall -y cupy-cuda12x && pip install cupy-cuda13x`",
    ),
    "CuPy for another CUDA that cannot be imported": (
        {
            "cupy": "",
            "cupy_cuda": 12000,
            "cupy_fault": "libcudart.so.12",
            "packages": ("cupy-cuda12x",),
        },
        "CuPy is for CUDA 12, but torch",
        "`pip uninstall -y cupy-cuda12x",
    ),
    "CuPy twice": (
        {"packages": ("cupy-cuda12x", "cupy-cuda13x")},
        "CuPy is installed 2 times",
        "`pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install cupy-cuda13x`",
    ),
    "CuPy without its compiler": (
        {"cupy_fault": "CuPy failed to load libnvrtc.so.13"},
        "libnvrtc.so.13",
        "'cupy-cuda13x[ctk]'",
    ),
    "prohibited": (
        {"gpus": (Gpu("H100", "aa", PROHIBITED),)},
        "GPU 0 (H100) is in prohibited mode",
        "`sudo nvidia-smi -i 0 -c DEFAULT`",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_is_one_line_with_its_fix(fault: str) -> None:
    changes, what, fix = BAD[fault]
    state = dataclasses.replace(GOOD, **changes)
    told = cuda_state.problem(state)
    assert what in told
    assert fix in told
    assert "\n" not in told
    with pytest.raises(DeviceError, match=r"^cuda: "):
        cuda_state.require(state)


def test_what_works_is_no_fault() -> None:
    assert cuda_state.problem(GOOD) == ""
    assert cuda_state.require(GOOD) is GOOD
    newer = dataclasses.replace(GOOD, driver=13020, torch_cuda="13.1")
    assert cuda_state.problem(newer) == ""
    older = dataclasses.replace(GOOD, driver=13000, torch_cuda="13.1")
    assert cuda_state.problem(older) == "", "within a major version drivers run newer runtimes"
    alone = dataclasses.replace(GOOD, gpus=(Gpu("H100", "aa", EXCLUSIVE),))
    assert cuda_state.problem(alone) == "", "one process may have it"
    one = dataclasses.replace(GOOD, gpus=(Gpu("H100", "aa", PROHIBITED), Gpu("H100", "bb")))
    assert cuda_state.problem(one) == ""


def test_auto_takes_a_gpu_that_can_be_used_and_says_why_it_does_not() -> None:
    assert cuda_state.resolve("cpu", GOOD) == ("cpu", "")
    assert cuda_state.resolve("cuda", GOOD) == ("cuda", "")
    assert cuda_state.resolve("auto", GOOD) == ("cuda", "")
    assert cuda_state.resolve("auto", CudaState()) == ("cpu", "")
    device, told = cuda_state.resolve("auto", dataclasses.replace(GOOD, driver=12040))
    assert device == "cpu"
    assert told.startswith("the GPU is not used: the NVIDIA driver runs CUDA 12.4 at most")
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        cuda_state.resolve("cuda", CudaState())


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nFor debugging consider",
        "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA_ERROR_DEVICE_UNAVAILABLE: busy or unavailable",
    ],
)
def test_a_gpu_in_exclusive_mode_that_another_process_has(text: str) -> None:
    state = dataclasses.replace(GOOD, gpus=(H100, Gpu("H100", "bb", EXCLUSIVE)))
    told = cuda_state.explain(RuntimeError(text), state, 1)
    assert "GPU 1 is in exclusive mode, and another process has it" in told
    assert "`sudo nvidia-smi -i 1 -c DEFAULT`" in told
    assert "is busy or unavailable" in cuda_state.explain(RuntimeError(text), state, 0)


def test_other_errors_of_a_start() -> None:
    for text in ("CUDA error: out of memory", "cudaErrorMemoryAllocation: out of memory"):
        assert "has no memory left" in cuda_state.explain(RuntimeError(text), GOOD, 0)
    told = cuda_state.explain(RuntimeError("CUDA error: an ECC error\nmore"), GOOD, 0)
    assert told == "GPU 0 cannot be used: CUDA error: an ECC error"


# ---- asking --------------------------------------------------------------------------------------

DRIVER = r"""
#include <stdlib.h>
#include <string.h>
static int number(const char *name, int other) {
    const char *text = getenv(name);
    return text ? atoi(text) : other;
}
int cuInit(unsigned flags) { return number("FAKE_CUDA_FAULT", 0); }
int cuDriverGetVersion(int *version) { *version = number("FAKE_CUDA_DRIVER", 13000); return 0; }
int cuDeviceGetCount(int *count) { *count = number("FAKE_CUDA_COUNT", 2); return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strcpy(name, "Fake GPU"); return 0; }
int cuDeviceGetUuid(char *uuid, int device) { memset(uuid, device, 16); return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) {
    *value = what == 20 ? number("FAKE_CUDA_MODE", 0) : -1;
    return 0;
}
"""
TORCH = """
import types
__version__ = "2.11.0"
version = types.SimpleNamespace(cuda="13.0")
"""
CUPY = """
import types
__version__ = "13.6.0"
def compiler(): {compiler}
cuda = types.SimpleNamespace(
    runtime=types.SimpleNamespace(runtimeGetVersion=lambda: {version}),
    nvrtc=types.SimpleNamespace(getVersion=compiler),
)
"""
FRAMED = '''raise ImportError("""
=====
Failed to import CuPy.
Original error:
  ImportError: libcudart.so.12: cannot open shared object file
=====
""")'''
TELL = "from hpcsync import cuda_state; print(cuda_state.problem(cuda_state.look()))"


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder with a fake of the driver's library."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler is missing: apt-get install gcc")
    source, folder = tmp_path / "driver.c", tmp_path / "driver"
    source.write_text(DRIVER)
    folder.mkdir()
    library = folder / cuda_state.LIBRARY
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return folder


@pytest.fixture
def told(tmp_path: Path, driver: Path) -> Callable[..., str]:
    """What a new Python says that sees the fakes."""

    def run(cupy: str = CUPY.format(compiler="return 13, 0", version=13000), **env: str) -> str:
        fake = module(tmp_path / "fake", "torch", TORCH)
        module(fake, "cupy", cupy)
        paths = {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(fake)}
        done = subprocess.run(
            [sys.executable, "-c", TELL],
            env={**os.environ, **paths, **env},
            cwd=Path(cuda_state.__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_the_driver_is_asked(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_MODE", str(EXCLUSIVE))

    def load(name: str) -> Any:
        return ctypes.CDLL(str(driver / name))

    state = cuda_state.look(load)
    assert state.driver == 13000
    assert [gpu.uuid for gpu in state.gpus] == ["28" * 16, "29" * 16]
    assert state.gpus[0] == Gpu("Fake GPU", "28" * 16, EXCLUSIVE)


def test_nothing_is_asked_where_there_is_no_driver() -> None:
    def load(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    state = cuda_state.look(load)
    assert (state.driver, state.gpus, state.cupy) == (0, (), "")
    assert "no NVIDIA driver" in cuda_state.problem(state)


def test_the_compiler_of_torchs_wheels_is_found(tmp_path: Path, told: Callable[..., str]) -> None:
    """CuPy before 14 asks the linker alone. A version that no wheel of this environment has."""
    library = tmp_path / "fake" / "nvidia" / "cu13" / "lib" / "libnvrtc.so.99"
    library.parent.mkdir(parents=True)
    words = ["-shared", "-x", "c", "/dev/null", f"-Wl,-soname,{library.name}", "-o", library]
    subprocess.run([str(shutil.which("gcc") or shutil.which("cc")), *words], check=True)
    compiler = """
    import ctypes
    try:
        ctypes.CDLL("libnvrtc.so.99")
    except OSError as error:
        raise RuntimeError(f"CuPy failed to load libnvrtc.so.99: OSError: {error}") from error
    return 13, 0"""
    assert told(CUPY.replace("{compiler}", compiler).replace("{version}", "13000")) == ""
    library.unlink()
    assert "cannot be used (CuPy failed to load libnvrtc.so.99" in told(
        CUPY.replace("{compiler}", compiler).replace("{version}", "13000")
    )


def test_faults_as_a_process_meets_them(told: Callable[..., str]) -> None:
    assert told() == ""
    assert "runs CUDA 12.4 at most" in told(FAKE_CUDA_DRIVER="12040")
    assert "finds no GPU" in told(FAKE_CUDA_FAULT="100")
    assert "names no GPU" in told(FAKE_CUDA_FAULT="100", CUDA_VISIBLE_DEVICES="7")
    assert "prohibited mode" in told(FAKE_CUDA_MODE="2")
    assert "is for CUDA 12, but torch" in told(CUPY.format(compiler="return 13, 0", version=12090))
    missing = "raise RuntimeError('CuPy failed to load libnvrtc.so.13: OSError: no such file')"
    assert "libnvrtc.so.13" in told(CUPY.format(compiler=missing, version=13000))
    assert "libcudart.so.12: cannot open" in told(FRAMED)
    assert "CuPy is missing" in told("raise ModuleNotFoundError('no cupy', name='cupy')")
