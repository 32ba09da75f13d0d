"""Whether CUDA can be used here, and if not, why and what to do: asked before anything is made.

The driver is asked by its own library, which makes no context and holds no memory of a GPU: a GPU
in exclusive mode stays free. torch and CuPy tell what they were built for.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from . import nvrtc
from .errors import DeviceError

LIBRARY = "libcuda.so.1"
DEFAULT, PROHIBITED, EXCLUSIVE = 0, 2, 3  # CUcomputemode
_COMPUTE_MODE = 20  # CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
_NO_DEVICE = 100  # CUresult
_FAULTS = {
    802: "the GPUs' switches are not ready: the administrator must start nvidia-fabricmanager",
    803: "the driver's library and its kernel module are of different versions: restart the "
    "machine (containers: start them anew after the host's driver was updated)",
    804: "the CUDA compatibility package does not support this GPU: remove it from LD_LIBRARY_PATH",
    999: "the driver fails: `nvidia-smi` and `dmesg` tell why; restart the machine",
}
_OTHERWISE = "or set train.device=cpu"
_BUSY = ("busyorunavailable", "devicesunavailable", "devicealreadyinuse")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process sees.

    Attributes:
        uuid: a name that no other GPU has.
        mode: one of DEFAULT, PROHIBITED and EXCLUSIVE.
    """

    name: str
    uuid: str
    mode: int = DEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaState:
    """What driver, torch and CuPy say.

    Attributes:
        driver: the newest CUDA that the driver runs, as 1000 major + 10 minor; 0: no driver.
        fault: of starting the driver, a CUresult; 0 if it started.
        gpus: those that this process may use.
        torch: its version.
        torch_cuda: the CUDA that torch was built for, as ``12.8``; empty for none.
        cupy: its version; empty if it is missing.
        cupy_cuda: the CUDA that CuPy was built for, counted as the driver's; 0 if unknown.
        cupy_fault: why it cannot be imported, or cannot compile.
        packages: the installed packages that hold CuPy.
        visible: CUDA_VISIBLE_DEVICES; None if it is not set.
    """

    driver: int = 0
    fault: int = 0
    gpus: Sequence[Gpu] = ()
    torch: str = ""
    torch_cuda: str = ""
    cupy: str = ""
    cupy_cuda: int = 0
    cupy_fault: str = ""
    packages: Sequence[str] = field(default=())
    visible: str | None = None


def look(open_library: Callable[[str], Any] = ctypes.CDLL) -> CudaState:
    """Ask; imports torch, and CuPy where there is a driver."""
    torch = importlib.import_module("torch")
    driver, fault, gpus = _driver(open_library)
    built: dict[str, Any] = {}
    if driver and not fault:
        built = _cupy()
    return CudaState(
        driver=driver,
        fault=fault,
        gpus=gpus,
        torch=str(torch.__version__),
        torch_cuda=getattr(getattr(torch, "version", None), "cuda", None) or "",
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        **built,
    )


def driver_version() -> str:
    """The newest CUDA that the driver runs; empty where there is no driver."""
    number = _driver(ctypes.CDLL)[0]
    return _version(number) if number else ""


def visible_gpus() -> tuple[Gpu, ...]:
    """Those that the driver shows to this process; none where there is no driver."""
    return _driver(ctypes.CDLL)[2]


def _driver(open_library: Callable[[str], Any]) -> tuple[int, int, tuple[Gpu, ...]]:
    try:
        library = open_library(LIBRARY)
    except OSError:
        return 0, 0, ()
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    fault = int(library.cuInit(0)) or int(library.cuDeviceGetCount(ctypes.byref(count)))
    if fault:
        return version.value, fault, ()
    return version.value, 0, tuple(_gpu(library, index) for index in range(count.value))


def _gpu(library: Any, index: int) -> Gpu:
    handle, mode = ctypes.c_int(0), ctypes.c_int(DEFAULT)
    name, uuid = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    library.cuDeviceGet(ctypes.byref(handle), index)
    library.cuDeviceGetName(name, 256, handle)
    # The second one knows the parts that a GPU is cut into.
    getattr(library, "cuDeviceGetUuid_v2", library.cuDeviceGetUuid)(uuid, handle)
    library.cuDeviceGetAttribute(ctypes.byref(mode), _COMPUTE_MODE, handle)
    return Gpu(name.value.decode(errors="replace"), uuid.raw.hex(), mode.value)


def _cupy() -> dict[str, Any]:
    """What CuPy was built for, and whether it finds the compiler of its kernels."""
    packages = [
        name.replace("_", "-") for name in metadata.packages_distributions().get("cupy", [])
    ]
    named = [match[1] for name in packages if (match := re.fullmatch(r"cupy-cuda(\d+)x", name))]
    found: dict[str, Any] = {
        "packages": tuple(sorted(set(packages))),
        "cupy_cuda": 1000 * int(named[0]) if named else 0,
    }
    try:
        cupy = importlib.import_module("cupy")
        found["cupy"] = str(cupy.__version__)
        found["cupy_cuda"] = int(cupy.cuda.runtime.runtimeGetVersion())
        nvrtc.version(cupy)
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            found["cupy_fault"] = _line(error)
    except Exception as error:
        found["cupy_fault"] = _line(error)
    return found


def _line(error: BaseException) -> str:
    """The line of a text that says most; CuPy frames its own."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if re.search(r"lib\w+\.so|[Ee]rror:\s*\S", line)]
    told = [*said, *(line for line in lines if re.search(r"\w", line))]
    return told[0] if told else type(error).__name__


def problem(state: CudaState) -> str:
    """Why CUDA cannot be used, and what to do, in one line; empty if it can."""
    return _of_driver(state) or of_cupy(state) or _of_modes(state)


def _of_driver(state: CudaState) -> str:
    if not state.driver:
        return (
            f"no NVIDIA driver is here ({LIBRARY} is not found): install it (containers: start "
            f"them with --gpus all), {_OTHERWISE}"
        )
    if state.fault == _NO_DEVICE or (not state.fault and not state.gpus):
        if state.visible is not None:
            return (
                f"CUDA_VISIBLE_DEVICES={state.visible!r} names no GPU of this machine: unset it "
                f"(Slurm: ask for GPUs by --gpus-per-task=1 --gpu-bind=none), {_OTHERWISE}"
            )
        return f"the NVIDIA driver finds no GPU: `nvidia-smi` shows what it sees, {_OTHERWISE}"
    if state.fault:
        told = _FAULTS.get(state.fault, f"the NVIDIA driver does not start (error {state.fault})")
        return f"{told}, {_OTHERWISE}"
    if not state.torch_cuda:
        return (
            f"torch {state.torch} is a build for CPUs only: install its build for CUDA "
            f"{_version(state.driver)} or older, {_OTHERWISE}"
        )
    if _major(state.torch_cuda) > state.driver // 1000:
        return (
            f"the NVIDIA driver runs CUDA {_version(state.driver)} at most, but torch "
            f"{state.torch} is for CUDA {state.torch_cuda}: update the driver, or install torch's "
            f"build for CUDA {state.driver // 1000}"
        )
    return ""


def of_cupy(state: CudaState) -> str:
    """Why CuPy cannot be used, and what to do; empty if it can."""
    major = _major(state.torch_cuda)
    right = f"cupy-cuda{major}x"
    if len(state.packages) > 1:
        every = " ".join(state.packages)
        return (
            f"CuPy is installed {len(state.packages)} times ({every}): `pip uninstall -y {every} "
            f"&& pip install {right}`"
        )
    if not state.cupy and not state.cupy_fault:
        return f"CuPy is missing, which compiles the GPU kernels: `pip install {right}`"
    if state.cupy_cuda and state.cupy_cuda // 1000 != major:
        package = state.packages[0] if state.packages else "cupy"
        named = " ".join(("CuPy", state.cupy)).rstrip()
        return (
            f"{named} is for CUDA {state.cupy_cuda // 1000}, but torch {state.torch} for CUDA "
            f"{state.torch_cuda}: `pip uninstall -y {package} && pip install {right}`"
        )
    if state.cupy_fault:
        return (
            f"CuPy cannot be used ({state.cupy_fault}): `pip install --force-reinstall "
            f"'{right}[ctk]'`, or load the site's module of CUDA {major}"
        )
    return ""


def _of_modes(state: CudaState) -> str:
    closed = [at for at, gpu in enumerate(state.gpus) if gpu.mode == PROHIBITED]
    if not closed or len(closed) < len(state.gpus):
        return ""
    return (
        f"GPU {closed[0]} ({state.gpus[closed[0]].name}) is in prohibited mode, nothing may "
        f"compute on it: `sudo nvidia-smi -i {closed[0]} -c DEFAULT`, {_OTHERWISE}"
    )


def require(state: CudaState | None = None) -> CudaState:
    """What is here, if it can be used.

    Raises:
        DeviceError: it cannot.
    """
    state = state or look()
    if told := problem(state):
        raise DeviceError(f"cuda: {told}")
    return state


def resolve(wanted: str, state: CudaState | None = None) -> tuple[str, str]:
    """The device for ``train.device``, and what is to be told if a GPU is here but is not used.

    Args:
        wanted: auto, cpu or cuda.

    Raises:
        DeviceError: cuda, and it cannot be used.
    """
    if wanted == "cpu":
        return "cpu", ""
    if wanted == "cuda":
        require(state)
        return "cuda", ""
    state = state or look()
    told = problem(state)
    if not told:
        return "cuda", ""
    # Where no GPU can be expected nothing is missing.
    expected = state.gpus or state.fault not in (0, _NO_DEVICE)
    return "cpu", f"the GPU is not used: {told}" if expected else ""


def explain(error: BaseException, state: CudaState, index: int) -> str:
    """In one line why a device did not answer when its first memory was made.

    Args:
        error: of torch, CuPy or the runtime.
        index: of the GPU.
    """
    said = re.sub(r"[\s_-]", "", str(error)).lower()
    if any(word in said for word in _BUSY):
        mode = state.gpus[index].mode if index < len(state.gpus) else DEFAULT
        if mode == EXCLUSIVE:
            return (
                f"GPU {index} is in exclusive mode, and another process has it: end that one "
                "(`nvidia-smi` names it), start one rank a GPU, or "
                f"`sudo nvidia-smi -i {index} -c DEFAULT`"
            )
        return (
            f"GPU {index} is busy or unavailable: `nvidia-smi` shows who has it and whether it "
            "is well"
        )
    if "outofmemory" in said:
        return (
            f"GPU {index} has no memory left for a start: `nvidia-smi` names the processes that "
            "hold it"
        )
    return f"GPU {index} cannot be used: {_line(error)}"


def identity(state: CudaState) -> Mapping[str, str]:
    """What a result of trying a GPU depends on."""
    return {
        "driver": _version(state.driver),
        "torch": f"{state.torch} for CUDA {state.torch_cuda}",
        "cupy": f"{state.cupy} for CUDA {_version(state.cupy_cuda)}",
        "gpus": ", ".join(f"{gpu.name} {gpu.uuid} {gpu.mode}" for gpu in state.gpus),
    }


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _major(text: str) -> int:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0
