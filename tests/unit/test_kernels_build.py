"""The native kernels as users get them: from a checkout, from a wheel, from C, without a compiler.

The wheel is built and installed in temporary folders, without the network. Its kernels are
built without the optimiser, which gives the same bits sooner.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import build_kernels
from hpcsync.device import kernels

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["cuda", "hpcsync", "inputs", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in"]
PARTS += ["build_kernels.py", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"]
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


def make_sdist(checkout: Path) -> Path:
    """The archive of the sources; git, which would list more files, is not asked."""
    run(sys.executable, "setup.py", "-q", "sdist", cwd=checkout)
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    return sdist


def build_wheel(checkout: Path, source: str | Path = ".", **environment: str) -> tuple[Path, str]:
    """The wheel of the checkout or of an sdist, and what pip said."""
    out = checkout / "wheels"
    command = [*PIP, "wheel", "-v", "--no-build-isolation", *OFFLINE, "-w", out, source]
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
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdist(copy_checkout(tmp_path_factory.mktemp("sdist") / "checkout"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Made from the sdist, as one from a package index is."""
    return build_wheel(sdist.parent, sdist)[0]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed in."""
    target = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", *OFFLINE, "--target", target, wheel)
    return target


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkout with one empty source, and a compiler for it that counts its calls in ``log``."""
    source = tmp_path / "cuda" / "cpu" / "sums.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    shutil.copy(ROOT / "build_kernels.py", tmp_path)
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exec echo 1\n"
        f'echo $* >> {tmp_path}/log; for out; do :; done; echo built > "$out"\n'
    )
    compiler.chmod(0o755)
    return tmp_path


def test_sdist_holds_what_builds_the_package(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "cuda").rglob("*") if path.is_file()}
    assert {"build_kernels.py", "setup.py", "setup.cfg", "pyproject.toml", *native} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".new"))]


def test_sdist_installs_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    wheel, said = build_wheel(tmp_path, sdist, CXX="/bin/false")
    assert f"{WARNING}/bin/false ended with status 1" in said
    names = zipfile.ZipFile(wheel).namelist()
    assert "hpcsync/__init__.py" in names
    assert "hpcsync/libhpcsync_kernels.so" not in names
    assert "build_kernels.py" not in names


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("true", "[Errno 17] File exists: '{checkout}/build/kernels': remove {checkout}/build or"),
        ("'", "CXX=' is no command (no closing quotation): set CXX to a C++ compiler"),
    ],
    ids=["unwritable", "unquoted"],
)
def test_package_installs_where_kernels_cannot_be_built(
    tmp_path: Path, compiler: str, why: str
) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    (checkout / "build").mkdir()
    (checkout / "build" / "kernels").write_text("a file")
    command = [*PIP, "install", "-v", "--no-build-isolation", *OFFLINE, "-e", "."]
    done = run(*command, "--target", tmp_path / "at", cwd=checkout, CXX=compiler)
    said = done.stdout + done.stderr
    assert WARNING + why.format(checkout=checkout) in said
    assert "Traceback" not in said


@pytest.mark.parametrize("variable", ["CXX", "CC"])
def test_a_compiler_variable_that_is_no_command(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv(variable, "'g++")
    why = rf"^{variable}='g\+\+ is no command \(no closing quotation\): set {variable} to"
    with pytest.raises(build_kernels.BuildError, match=why):
        build_kernels.library()


def test_a_full_disk_is_told_in_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build_kernels, "ROOT", tiny)
    monkeypatch.setattr(build_kernels, "build", full)
    monkeypatch.setenv("CXX", str(tiny / "c++"))
    with pytest.raises(build_kernels.BuildError, match=r"No space left on device: remove .*$"):
        build_kernels.library()


def test_a_build_removes_what_others_left(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tiny / "build" / "kernels"
    (place / "tmpkilled").mkdir(parents=True)
    (place / "tmpkilled" / "sums-any.o").write_text("")
    (place / "0123.so").write_text("of an earlier version")
    monkeypatch.setattr(build_kernels, "ROOT", tiny)
    monkeypatch.setenv("CXX", str(tiny / "c++"))
    copy = tiny / "hpcsync" / "library.so"
    built = build_kernels.library(copy=copy)
    assert {path.name for path in place.iterdir()} == {"lock", built.name}
    assert [path.read_text() for path in copy.parent.iterdir()] == ["built\n"]


def test_without_locks_nothing_of_another_build_is_removed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*given: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    other = tiny / "build" / "kernels" / "tmpother"
    other.mkdir(parents=True)
    monkeypatch.setattr(build_kernels, "ROOT", tiny)
    monkeypatch.setattr(build_kernels.fcntl, "flock", flock)
    monkeypatch.setenv("CXX", str(tiny / "c++"))
    assert build_kernels.library().read_text() == "built\n"
    assert other.exists()


def test_builds_at_once_end_with_one_library(tiny: Path) -> None:
    command = [sys.executable, str(tiny / "build_kernels.py")]
    environment = {**os.environ, "CXX": str(tiny / "c++")}
    builds = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [build.wait() for build in builds] == [0] * 4
    (built,) = (tiny / "build" / "kernels").glob("*.so")
    assert built.read_text() == "built\n"
    links = [line for line in (tiny / "log").read_text().splitlines() if "-shared" in line]
    assert len(links) == 1


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


def test_library_is_built_again_when_anything_of_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "cuda" / "cpu" / "sums.cpp"
    header = tmp_path / "cuda" / "hpcsync_kernels.h"
    compiler, log = tmp_path / "c++", tmp_path / "log"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    header.write_text("1")

    def install_compiler(version: str) -> None:
        compiler.write_text(
            f"#!/bin/sh\n[ $1 = --version ] && exec echo {version}\n"
            f'echo $* >> {log}; for out; do :; done; echo built > "$out"\n'
        )
        compiler.chmod(0o755)

    def built(debug: bool = False) -> bool:
        log.write_text("")
        assert build_kernels.library(debug).read_text() == "built\n"
        return bool(log.read_text())

    monkeypatch.setattr(build_kernels, "ROOT", tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    install_compiler("1")
    assert built()
    assert not built()
    assert built(debug=True)
    source.write_text("2")
    assert built()
    header.write_text("2")
    assert built()
    source.rename(source.with_name("adds.cpp"))
    assert built()
    install_compiler("2")
    assert built()
    monkeypatch.setattr(build_kernels, "FLAGS", [*build_kernels.FLAGS, "-g"])
    assert built()
    assert not built()


def test_a_failing_build_leaves_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "cuda" / "cpu" / "sums.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("")
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] || { echo sums.cpp: error: no >&2; exit 1; }\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(build_kernels, "ROOT", tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build_kernels.BuildError, match=r"^sums.cpp: error: no$"):
        build_kernels.library()
    assert [path.name for path in (tmp_path / "build" / "kernels").iterdir()] == ["lock"]


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
