"""Builds the CPU kernels and lays the native sources into the wheel; the rest: pyproject.toml.

The kernels are a plain C library that ctypes loads, not a Python module: one build serves every
Python; build_kernels.py compiles it. Without a C++ compiler the package installs all the same, and
computes with NumPy.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# pip runs this file from elsewhere.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import build_kernels
from build_kernels import NATIVE, SOURCE, BuildError

LIBRARY = "hpcsync.libhpcsync_kernels"


class BuildKernels(build_ext):
    """Has the library compiled and lays it into the package.

    A package is installed without the library where it cannot be built; ``build_ext --inplace``,
    which asks for the library alone, fails. ``build_ext --debug`` leaves out the optimiser:
    quick to build, slow to run, the same bits.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        """As setuptools has it, without its own compiler.

        Nothing uses that one, and looking for it fails where CXX is no command.
        """
        self.alone = bool(self.inplace) and not self.editable_mode
        inplace, self.inplace = self.inplace, False
        for ext in self.extensions:
            self.build_extension(ext)
        self.inplace = inplace
        if inplace:
            self.copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        # What is left of an earlier build must not be taken for this one's.
        target.unlink(missing_ok=True)
        try:
            build_kernels.library(bool(self.debug), copy=target)
        except BuildError as error:
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
