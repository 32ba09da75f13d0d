"""Builds the CPU kernels and lays the native sources into the wheel; the rest: pyproject.toml.

The kernels are a plain C library that ctypes loads, not a Python module: one build serves every
Python. Each file of cuda/cpu is compiled once for each instruction set, and the library chooses
at run time. Without a C++ compiler the package installs all the same, and computes with NumPy.

The compiler is $CXX, else $CC, else the first of c++, g++ and clang++.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

LIBRARY = "hpcsync.libhpcsync_kernels"
NATIVE = Path("cuda")
SOURCE = NATIVE / "cpu"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# The library needs no C++ run time, so that a C program links it with nothing else.
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
# The same bits on every processor: no fused multiply-add, no reordering of sums.
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LINK = ["-shared", "-static-libgcc", "-Wl,--as-needed", "-Wl,-z,defs"]
SETS = {
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}


def find_compiler() -> list[str]:
    """The command of the C++ compiler.

    Python's own choice is not asked for: it names the compiler of the machine that Python was
    built on, which is often missing here.
    """
    chosen = os.environ.get("CXX") or os.environ.get("CC")
    if chosen:
        return shlex.split(chosen)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CompileError("no C++ compiler on PATH (looked for c++, g++, clang++)")


def call(command: list[str]) -> None:
    """Run the compiler, and show its warnings.

    Raises:
        CompileError: with the first error that it reports.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise CompileError(str(error)) from error
    if done.stderr:
        print(done.stderr, flush=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise CompileError((lines or [f"{command[0]} ended with status {done.returncode}"])[0])


def machine_sets() -> dict[str, list[str]]:
    """The instruction sets to build for, and the compiler's flags for each."""
    if platform.machine() in ("x86_64", "AMD64"):
        return {"plain": [], **SETS}
    return {"plain": []}


class BuildKernels(build_ext):
    """Compiles each kernel file for each instruction set and links them into one library.

    A package is installed without the library where it cannot be built; ``build_ext --inplace``,
    which asks for the library alone, fails. ``build_ext --debug`` leaves out the optimiser:
    quick to build, slow to run, the same bits.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        self.alone = bool(self.inplace) and not self.editable_mode
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        # What is left of an earlier build must not be taken for this one's.
        target.unlink(missing_ok=True)
        try:
            self.build_library([Path(each) for each in ext.sources], target)
        except CompileError as error:
            if self.alone:
                # Whoever asks for the library itself wants the error, and the old one kept.
                raise SystemExit(f"error: {error}") from error
            print(
                f"warning: hpcsync is installed without its native kernels: {error}. "
                "Sums and codecs will run in NumPy, which is slower.",
                file=sys.stderr,
                flush=True,
            )

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_library(self, sources: list[Path], target: Path) -> None:
        """Compile and link; the commands run side by side, as many as there are cores."""
        compiler = find_compiler()
        common = [*compiler, *FLAGS]
        sets = machine_sets()
        if len(sets) > 1:
            common.append("-DHPCSYNC_X86")
        work = Path(self.build_temp)
        commands: list[list[str]] = []
        objects: list[str] = []
        for source in sources:
            dispatch = source.stem == "dispatch"
            for name, flags in {"any": []}.items() if dispatch else sets.items():
                out = str(work / f"{source.stem}-{name}.o")
                isa = [] if dispatch else [f"-DHPCSYNC_ISA={name}", *flags]
                # Only processors of before 2013 run the plain one where there are others, and -O3
                # would take it half as long again.
                optimise = "-O2" if name == "plain" and len(sets) > 1 else "-O3"
                level = "-O0" if self.debug else optimise
                commands.append([*common, level, *isa, "-c", str(source), "-o", out])
                objects.append(out)
        # The longest first, so that none runs alone at the end.
        commands.sort(key=lambda command: -Path(command[-3]).stat().st_size)
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(call, commands))
        # A running program may have the old library open: put the new one in its place whole.
        fresh = target.with_suffix(".new")
        call([*compiler, *LINK, f"-Wl,-soname,{target.name}", *objects, "-o", str(fresh)])
        fresh.replace(target)


class BuildPackage(build_py):
    """Lays cuda/ into the wheel's package: the C header, and the sources that NVRTC compiles."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._native():
                self.mkpath(os.path.dirname(target))
                self.copy_file(source, target, preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        native = [] if self.editable_mode else [target for _, target in self._native()]
        return [*super().get_outputs(include_bytecode), *native]

    def _native(self) -> list[tuple[str, str]]:
        files = sorted(path for path in NATIVE.rglob("*") if path.is_file())
        return [(str(path), os.path.join(self.build_lib, "hpcsync", str(path))) for path in files]


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for its platform and any Python 3: the library knows no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            LIBRARY,
            sorted(str(path) for path in SOURCE.glob("*.cpp")),
            depends=sorted(str(path) for path in NATIVE.rglob("*.[hd]*")),
            optional=True,  # absent where it could not be built
        )
    ],
    cmdclass={
        "build_ext": BuildKernels,
        "build_py": BuildPackage,
        "bdist_wheel": AnyPythonWheel,
    },
)
