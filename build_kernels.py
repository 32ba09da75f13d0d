"""Compiles the CPU kernels: needs Python's standard library and a C++ compiler, nothing else.

    python build_kernels.py

Each file of cuda/cpu is compiled once for each instruction set; the library chooses at run time.
It is left in build/kernels under a digest of all that it is made of, and not made again while that
is the same. setup.py takes it from there, so whoever installs may have it built meanwhile.

The compiler is $CXX, else $CC, else the first of c++, g++ and clang++.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NATIVE = Path("cuda")
SOURCE = NATIVE / "cpu"
NAME = "libhpcsync_kernels.so"
LOCK = "lock"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# The library needs no C++ run time, so that a C program links it with nothing else.
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
# The same bits on every processor: no fused multiply-add, no reordering of sums.
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LINK = ["-shared", "-static-libgcc", "-Wl,--as-needed", "-Wl,-z,defs", f"-Wl,-soname,{NAME}"]
SETS = {
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}


class BuildError(Exception):
    """Why there is no library, in one line."""


def find_compiler() -> list[str]:
    """The command of the C++ compiler.

    Python's own choice is not asked for: it names the compiler of the machine that Python was
    built on, which is often missing here.

    Raises:
        BuildError: there is none, or the variable that names it is no command.
    """
    for variable in ("CXX", "CC"):
        chosen = os.environ.get(variable, "").strip()
        if chosen:
            try:
                return shlex.split(chosen)
            except ValueError as error:
                raise BuildError(
                    f"{variable}={chosen} is no command ({str(error).lower()}): "
                    f"set {variable} to a C++ compiler, such as g++"
                ) from error
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler on PATH (looked for c++, g++, clang++)")


def call(command: list[str]) -> str:
    """Run the compiler, show its warnings, and return what it prints.

    Raises:
        BuildError: with the first error that it reports.
    """
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise BuildError(str(error)) from error
    if done.stderr:
        print(done.stderr, flush=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        raise BuildError((lines or [f"{command[0]} ended with status {done.returncode}"])[0])
    return done.stdout


def machine_sets() -> dict[str, list[str]]:
    """The instruction sets to build for, and the compiler's flags for each."""
    if platform.machine() in ("x86_64", "AMD64"):
        return {"plain": [], **SETS}
    return {"plain": []}


def compilations(debug: bool) -> dict[str, list[str]]:
    """Flags and source by the name of the object, the longest to compile first."""
    sets = machine_sets()
    x86 = ["-DHPCSYNC_X86"] if len(sets) > 1 else []
    made = {}
    sources = (ROOT / SOURCE).glob("*.cpp")
    # The longest first, so that none runs alone at the end.
    for path in sorted(sources, key=lambda path: (-path.stat().st_size, path.name)):
        dispatch = path.stem == "dispatch"
        for name, flags in {"any": []}.items() if dispatch else sets.items():
            isa = [] if dispatch else [f"-DHPCSYNC_ISA={name}", *flags]
            # Only processors of before 2013 run the plain one where there are others, and -O3
            # would take it half as long again.
            optimise = "-O2" if name == "plain" and x86 else "-O3"
            level = "-O0" if debug else optimise
            source = str(path.relative_to(ROOT))
            made[f"{path.stem}-{name}.o"] = [*FLAGS, *x86, level, *isa, "-c", source]
    return made


def digest(compiler: list[str], commands: dict[str, list[str]]) -> str:
    """Of all that the library is made of: compiler, flags and sources."""
    told = call([*compiler, "--version"])
    where = shutil.which(compiler[0]) or compiler[0]
    found = hashlib.sha256(repr((told, os.path.realpath(where), compiler, commands, LINK)).encode())
    for path in sorted(path for path in (ROOT / NATIVE).rglob("*") if path.is_file()):
        content = path.read_bytes()
        found.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return found.hexdigest()


def library(debug: bool = False, copy: Path | None = None) -> Path:
    """The finished library, built unless it is there. ``debug`` leaves out the optimiser.

    The next one that is built takes its place; ``copy``, if given, is replaced by a copy of it.

    Raises:
        BuildError: there is no compiler, it fails, or its output cannot be written.
    """
    compiler = find_compiler()
    place = ROOT / "build" / "kernels"
    try:
        commands = compilations(debug)
        target = place / f"{digest(compiler, commands)}.so"
        with locked(place) as alone:
            if not target.exists():
                if alone:
                    clear(place)
                with tempfile.TemporaryDirectory(dir=place) as work:
                    build(compiler, commands, Path(work)).replace(target)
            if copy is not None:
                put(target, copy)
    except OSError as error:
        raise BuildError(
            f"{error}: remove {place.parent} or make it yours, and have space on the disk"
        ) from error
    return target


@contextlib.contextmanager
def locked(place: Path) -> Iterator[bool]:
    """Make the folder ours alone; False where the file system has no locks, as a cluster's may.

    Whoever comes second waits for the first, and finds its library. Without locks both build, and
    either's is right.
    """
    place.mkdir(parents=True, exist_ok=True)
    with (place / LOCK).open("w") as lock:
        alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        yield alone


def clear(place: Path) -> None:
    """Remove earlier libraries, and what builds that were killed have left."""
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def put(built: Path, target: Path) -> None:
    """Copy a library; a program that runs with the old one keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".new")
    try:
        shutil.copy(built, fresh)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def build(compiler: list[str], commands: dict[str, list[str]], work: Path) -> Path:
    """Compile and link; the commands run side by side, as many as there are cores."""
    objects = [str(work / name) for name in commands]
    calls = [
        [*compiler, *flags, "-o", out]
        for flags, out in zip(commands.values(), objects, strict=True)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(call, calls))
    call([*compiler, *LINK, *objects, "-o", str(work / NAME)])
    return work / NAME


def main() -> int:
    """Build in the background of other work, which goes first."""
    os.nice(5)
    try:
        library()
    except BuildError as error:
        print(f"error: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
