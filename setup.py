"""Builds the CPU kernels; everything else stands in pyproject.toml.

The kernels are a plain C library that ctypes loads, not a Python module. Every file of cuda/cpu
is compiled once for each instruction set, and the library chooses at run time. Without a C++
compiler the package installs all the same, and computes with NumPy.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIBRARY = "hpcsync.libhpcsync_kernels"
SOURCE = Path("cuda/cpu")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# The same bits on every processor: no fused multiply-add, no reordering of sums.
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
SETS = {
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}


class BuildKernels(build_ext):
    """Compiles each kernel file for each instruction set and links them into one library."""

    def get_ext_filename(self, ext_name: str) -> str:
        return os.path.join(*ext_name.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        sets: dict[str, list[str]] = {"plain": []}
        defines: list[tuple[str, str | None]] = []
        if platform.machine() in ("x86_64", "AMD64"):
            sets |= SETS
            defines = [("HPCSYNC_X86", None)]
        objects: list[str] = []
        for name, flags in sets.items():
            objects += self.compiler.compile(
                [source for source in ext.sources if not source.endswith("dispatch.cpp")],
                output_dir=os.path.join(self.build_temp, name),
                macros=[*defines, ("HPCSYNC_ISA", name)],
                extra_postargs=FLAGS + flags,
            )
        objects += self.compiler.compile(
            [str(SOURCE / "dispatch.cpp")],
            output_dir=self.build_temp,
            macros=defines,
            extra_postargs=FLAGS,
        )
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.compiler.link_shared_object(objects, target, target_lang="c++")


setup(
    ext_modules=[
        Extension(
            LIBRARY,
            sorted(str(path) for path in SOURCE.glob("*.cpp")),
            depends=[str(path) for path in Path("cuda").rglob("*.[hd]*")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
