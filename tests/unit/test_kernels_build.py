"""The native kernels as users get them: from a checkout, from a wheel, from C, without a compiler.

The wheel is built and installed in temporary folders, without the network. Its kernels are
built without the optimiser, which gives the same bits sooner.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hpcsync.device import kernels

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["cuda", "hpcsync", "inputs", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in"]
PARTS += ["README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
OFFLINE = ["--no-deps", "--no-index"]
WARNING = "warning: hpcsync is installed without its native kernels: "

needs_gxx = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++ is missing: apt-get install g++"
)
needs_library = pytest.mark.skipif(kernels.load() is None, reason=kernels.missing())


def run(
    *command: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; its output if it succeeds."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def copy_checkout(target: Path) -> Path:
    """A checkout of its own, so that builds leave nothing in the real one."""
    target.mkdir()
    forget = shutil.ignore_patterns("__pycache__", "*.so")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=forget)
        else:
            shutil.copy(source, target)
    with (target / "setup.cfg").open("a") as settings:
        settings.write("\n[build_ext]\ndebug = 1\n")
    return target


def build_wheel(checkout: Path, **environment: str) -> tuple[Path, str]:
    """The wheel, and what pip said."""
    out = checkout / "wheels"
    command = [*PIP, "wheel", "-v", "--no-build-isolation", *OFFLINE, "-w", out, "."]
    done = run(*command, cwd=checkout, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout + done.stderr


def ask(code: str, packages: Path) -> list[str]:
    """Words that Python prints with hpcsync taken from ``packages`` alone."""
    code = f"import hpcsync.device.kernels as k; print({code})"
    return run(sys.executable, "-c", code, cwd=packages, PYTHONPATH=str(packages)).stdout.split()


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which no compiler is found."""
    return {"PATH": str(tmp_path_factory.mktemp("empty")), "CC": "", "CXX": ""}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(copy_checkout(tmp_path_factory.mktemp("wheel") / "checkout"))[0]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed in."""
    target = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", *OFFLINE, "--target", target, wheel)
    return target


@needs_gxx
def test_wheel_is_for_any_python(wheel: Path) -> None:
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert platform.startswith("linux_")


@needs_gxx
def test_wheel_holds_the_native_sources_and_nothing_built(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.removeprefix("hpcsync/") for name in names if name.startswith("hpcsync/cuda/")}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "cuda").rglob("*") if path.is_file()}
    assert shipped == here
    assert not any(path.endswith(".py") for path in here), "cuda/ is no package"
    assert [name for name in names if name.endswith((".so", ".o", ".new"))] == [
        "hpcsync/libhpcsync_kernels.so"
    ]


@needs_gxx
def test_wheel_loads_its_own_library_and_sources(installed: Path) -> None:
    assert ask("k.load() is not None, k.LIBRARY, k.include_folder()", installed) == [
        "True",
        str(installed / "hpcsync" / "libhpcsync_kernels.so"),
        str(installed / "hpcsync" / "cuda"),
    ]


@needs_library
def test_checkout_finds_its_library_and_sources() -> None:
    assert kernels.LIBRARY == ROOT / "hpcsync" / "libhpcsync_kernels.so"
    assert kernels.source_folder() == ROOT / "cuda"
    assert (kernels.include_folder() / "hpcsync_kernels.h").is_file()


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PACKAGE", tmp_path / "hpcsync")
    with pytest.raises(FileNotFoundError, match=r"cuda/hpcsync_kernels\.h"):
        kernels.source_folder()


def test_without_a_compiler_the_wheel_warns_and_computes_with_numpy(
    tmp_path: Path, without_compiler: dict[str, str]
) -> None:
    wheel, said = build_wheel(copy_checkout(tmp_path / "checkout"), **without_compiler)
    assert [line.strip() for line in said.splitlines() if "native kernels" in line] == [
        f"{WARNING}no C++ compiler on PATH (looked for c++, g++, clang++). "
        "Sums and codecs will run in NumPy, which is slower."
    ]
    run(*PIP, "install", *OFFLINE, "--target", tmp_path / "installed", wheel)
    load, *why = ask("k.load(), k.missing()", tmp_path / "installed")
    assert load == "None"
    assert " ".join(why).startswith("the native kernels were not built")
    assert why[-2:] == ["--force-reinstall", "hpcsync"]


@needs_gxx
def test_editable_install_without_a_compiler_leaves_no_stale_library(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    library = checkout / "hpcsync" / "libhpcsync_kernels.so"
    library.write_text("of an earlier version")
    command = [*PIP, "install", "-v", "--no-build-isolation", *OFFLINE, "-e", "."]
    said = run(*command, "--target", tmp_path / "at", cwd=checkout, CXX="/bin/false")
    assert f"{WARNING}/bin/false ended with status 1" in said.stdout + said.stderr
    assert not library.exists()


def test_asking_for_the_library_alone_fails_and_keeps_the_old_one(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    library = checkout / "hpcsync" / "libhpcsync_kernels.so"
    library.write_text("of an earlier version")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with pytest.raises(AssertionError, match="error: /bin/false ended with status 1"):
        run(*command, cwd=checkout, CXX="/bin/false")
    assert library.exists()


@needs_gxx
def test_editable_install_builds_into_the_checkout(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    # One family is enough here, and soon compiled.
    for path in (checkout / "cuda" / "cpu").glob("*.cpp"):
        if path.stem not in ("dispatch", "sums"):
            path.unlink()
    (checkout / "cuda" / "cpu" / "kernels.def").write_text('#include "sums.def"\n')
    command = [*PIP, "install", "--no-build-isolation", *OFFLINE, "-e", "."]
    run(*command, "--target", tmp_path / "at", cwd=checkout)
    assert ask("k.load() is not None, k.LIBRARY, k.source_folder()", checkout) == [
        "True",
        str(checkout / "hpcsync" / "libhpcsync_kernels.so"),
        str(checkout / "cuda"),
    ]


@needs_gxx
@pytest.mark.parametrize(
    "words", [["gcc", "-x", "c", "-std=c11"], ["g++", "-x", "c++", "-std=c++17"]], ids=["c", "c++"]
)
def test_header_stands_alone(tmp_path: Path, words: list[str]) -> None:
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"]
    run(*words, *strict, kernels.include_folder() / "hpcsync_kernels.h", cwd=tmp_path)


@needs_gxx
@needs_library
@pytest.mark.parametrize("origin", ["checkout", "wheel"])
def test_c_program(tmp_path: Path, origin: str, request: pytest.FixtureRequest) -> None:
    include, library = kernels.include_folder(), kernels.LIBRARY.parent
    if origin == "wheel":
        library = request.getfixturevalue("installed") / "hpcsync"
        include = library / "cuda"
    program = tmp_path / "use_kernels"
    strict = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-ffp-contract=off"]
    link = ["-L", library, "-l", "hpcsync_kernels", f"-Wl,-rpath,{library}", "-lm"]
    source = ROOT / "tests" / "c" / "use_kernels.c"
    run("gcc", *strict, "-I", include, source, *link, "-o", program)
    said = run(program).stdout
    assert "WRONG" not in said
    assert "plain:" in said
