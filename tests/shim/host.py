"""The GPU kernels compiled for the host, as ``hpcsync.device.cuda_kernels`` calls them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcsync.device import cuda_launch, cuda_modules, kernels

HERE = Path(__file__).resolve().parent
FLAGS = ["-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra"]
FLAGS += ["-ffp-contract=off", "-fno-strict-aliasing", "-Wno-strict-aliasing"]
MISSING = "" if shutil.which("g++") else "g++ is missing: apt-get install g++"
SOURCES = {".cu", ".h", ".cuh", ".hpp", ".def"}
CANARY = 0xA5
GUARD = 64


class Pointers(ctypes.Structure):
    """The pointer table that kernels take by value."""

    _fields_ = (("at", ctypes.c_uint64 * cuda_launch.MOST_ARRAYS),)


C_TYPES: dict[type, Any] = {
    np.uint64: ctypes.c_uint64,
    np.uint32: ctypes.c_uint32,
    np.int32: ctypes.c_int32,
    np.float32: ctypes.c_float,
}


def kernel_names(family: str) -> list[str]:
    """The kernels of a family, with its macros expanded."""
    folder = kernels.source_folder()
    command = ["g++", "-E", "-P", "-x", "c++", f"-include{HERE / 'cuda_shim.h'}"]
    done = subprocess.run(
        [*command, str(folder / "gpu" / f"{family}.cu")],
        capture_output=True,
        text=True,
        check=True,
    )
    return re.findall(r'extern "C"\s+void\s+(\w+)\(', done.stdout)


@functools.cache
def cache() -> Path:
    """Where compiled families are kept from one process to the next: the user's own folder."""
    folder = Path(tempfile.gettempdir()) / f"hpcsync-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Code is loaded from it: nobody else may have put it there.
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="hpcsync-shim-"))
    return folder


@functools.cache
def digest(text: str) -> str:
    """Of all that a family's library is made of: its text, the sources, flags and compiler."""
    told = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    found = hashlib.sha256(repr((text, told, os.uname().machine, FLAGS)).encode())
    for folder in (kernels.source_folder(), HERE):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCES):
            found.update(f"{path}\n".encode() + path.read_bytes())
    return found.hexdigest()


@functools.cache
def library(family: str) -> ctypes.CDLL:
    """A family's kernels, compiled by g++ with the shim."""
    source = kernels.source_folder() / "gpu" / f"{family}.cu"
    entries = "\n".join(f"SHIM_KERNEL({name})" for name in kernel_names(family))
    text = f'#include "{HERE}/cuda_shim.h"\n#include "{source}"\n{entries}\n'
    kept = cache() / f"{family}-{digest(text)}.so"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            main, target = Path(folder) / "main.cpp", Path(folder) / f"{family}.so"
            main.write_text(text)
            done = subprocess.run(
                ["g++", *FLAGS, str(main), "-o", str(target)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert not done.stderr, done.stderr
            target.replace(kept)
    return ctypes.CDLL(str(kept))


def to_c(argument: Any) -> Any:
    """A kernel's argument as ctypes passes it."""
    if isinstance(argument, np.ndarray):
        assert argument.nbytes == ctypes.sizeof(Pointers)
        return Pointers.from_buffer_copy(argument)
    return C_TYPES[type(argument)](argument)


def function(name: str, backwards: bool) -> cuda_launch.Launch:
    """A kernel, called as CuPy's are; ``backwards`` runs threads in the opposite order."""
    entry = ctypes.c_void_p.in_dll(library(cuda_modules.family_of(name)), f"shim_{name}").value

    def call(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
        given = [to_c(argument) for argument in arguments]
        types = [type(each) for each in given]
        head = (ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_int)
        run = ctypes.CFUNCTYPE(None, *head, *types)(entry)
        run(name.encode(), grid[0], block[0], int(backwards), *given)

    return call


def launcher(backwards: bool = False) -> cuda_launch.Launcher:
    """A device of one small processor: grids are smaller than the work, and go round."""
    return cuda_launch.Launcher(lambda name: function(name, backwards), processors=1)


class Memory:
    """An array of device memory, between guards that nothing may write to.

    Args:
        values: what it holds at first.
        shift: bytes by which it misses the alignment of 64 bytes.
    """

    def __init__(self, values: NDArray[Any], shift: int = 0) -> None:
        size = values.nbytes
        self.raw = np.full(size + 2 * GUARD + 64 + shift, CANARY, np.uint8)
        self.start = -self.raw.ctypes.data % 64 + GUARD + shift
        self.stop = self.start + size
        self.dtype = values.dtype
        self.raw[self.start : self.stop] = np.frombuffer(values.tobytes(), np.uint8)

    @property
    def address(self) -> int:
        return int(self.raw.ctypes.data) + self.start

    @property
    def values(self) -> NDArray[Any]:
        """A copy of what it holds, once nothing beside it was touched."""
        assert (self.raw[: self.start] == CANARY).all(), "written before the array"
        assert (self.raw[self.stop :] == CANARY).all(), "written behind the array"
        return np.frombuffer(self.raw[self.start : self.stop].tobytes(), self.dtype).copy()


def address(memory: Memory | None) -> int | None:
    return None if memory is None else memory.address
