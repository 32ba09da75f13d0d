"""The two commands of the README: what they install, and what they start."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests import doctor
from tools import bootstrap


class StartedError(Exception):
    """Stands for the process that bootstrap would become."""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Sets of extras that were installed, instead of installing them."""
    calls: list[list[str]] = []

    def make(where: Path) -> None:
        (where / "bin").mkdir(parents=True)
        (where / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(bootstrap, "make_environment", make)
    monkeypatch.setattr(bootstrap, "install", lambda python, extras, _: calls.append(extras))
    monkeypatch.setattr(bootstrap, "kernels_meanwhile", contextlib.nullcontext)
    return calls


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Command lines that were started, instead of becoming them."""
    calls: list[list[str]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        calls.append(command)
        raise StartedError

    monkeypatch.setattr(bootstrap.os, "execve", execve)
    monkeypatch.setattr(bootstrap, "is_open_mpi", lambda mpirun: True)
    return calls


def test_train_passes_on_what_it_does_not_know(
    tmp_path: Path, installed: list[list[str]], started: list[list[str]]
) -> None:
    words = ["laptop", "train.steps=3", "--out", "here", "--dry-run"]
    with pytest.raises(StartedError):
        bootstrap.main(["--venv", str(tmp_path / "v"), "train", "-n", "3", *words])
    (command,) = started
    assert command[:3] == [str(tmp_path / "v" / "bin" / "mpirun"), "-n", "3"]
    assert command[-len(words) - 2 :] == ["-m", "hpcsync.train", *words]
    assert installed == [["mpi"]]


@pytest.mark.parametrize("word", ["digits", "data.name=digits"])
def test_scikit_learn_is_installed_only_for_digits(
    tmp_path: Path, installed: list[list[str]], started: list[list[str]], word: str
) -> None:
    with pytest.raises(StartedError):
        bootstrap.main(["--venv", str(tmp_path / "v"), "train", word])
    assert installed == [["digits", "mpi"]]


def test_test_runs_pytest_in_the_checkout(
    tmp_path: Path,
    installed: list[list[str]],
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartedError):
        bootstrap.main(["--venv", str(tmp_path / "v"), "test", "-k", "plan", "-x"])
    assert started[0][1:4] == ["-m", "pytest", "-n"]
    assert 1 <= int(started[0][4]) <= 8
    assert started[0][5:] == ["-k", "plan", "-x"]
    assert Path.cwd() == bootstrap.ROOT


def test_environment_is_reused_until_the_pins_change(
    tmp_path: Path, installed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "v"
    bootstrap.prepare(where, ["digits", "mpi"])
    bootstrap.prepare(where, ["mpi"])
    assert installed == [["digits", "mpi"]]
    bootstrap.prepare(where, ["mpi", "test"])
    assert installed[1:] == [["digits", "mpi", "test"]], "what is there stays there"
    monkeypatch.setattr(bootstrap, "fingerprint", lambda: "other pins")
    bootstrap.prepare(where, ["mpi"])
    assert installed[2:] == [["mpi"]]
    assert json.loads((where / bootstrap.STAMP).read_text())["pins"] == "other pins"


def test_environment_is_rebuilt_when_native_sources_or_the_compiler_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "cuda" / "cpu" / "sums.cpp"
    source.parent.mkdir(parents=True)
    names = ("constraints.txt", "pyproject.toml", "setup.py", "build_kernels.py")
    for path in (*(tmp_path / name for name in names), source):
        path.write_text("1")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    there: set[str] = set()
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    digests = [bootstrap.fingerprint()]
    assert bootstrap.fingerprint() == digests[0]
    source.write_text("2")
    digests.append(bootstrap.fingerprint())
    source.rename(source.with_name("adds.cpp"))
    digests.append(bootstrap.fingerprint())
    there.add("g++")
    digests.append(bootstrap.fingerprint())
    monkeypatch.setenv("CC", "clang -O1")
    digests.append(bootstrap.fingerprint())
    there.add("clang")
    digests.append(bootstrap.fingerprint())
    monkeypatch.setenv("CXX", "'")
    digests.append(bootstrap.fingerprint())
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("print('compiled')", ""),
        ("print('a.cpp: error: no'); raise SystemExit(1)", "not built: a.cpp: error: no; sums"),
    ],
)
def test_kernels_that_cannot_be_built_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    told: str,
) -> None:
    (tmp_path / "build_kernels.py").write_text(script)
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    with bootstrap.kernels_meanwhile():
        pass
    said = capsys.readouterr().err
    assert told in said
    assert len(said.splitlines()) == (1 if told else 0)


def test_a_dependency_from_source_is_built_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []

    def quiet(*command: str) -> str | None:
        calls.append(command)
        return "ERROR: no" if "--no-build-isolation" in command else None

    monkeypatch.setattr(bootstrap, "_quiet", quiet)
    bootstrap.install(tmp_path / "python", ["mpi"])
    assert [command[-1] for command in calls[1:]] == [f"{bootstrap.ROOT}[mpi]"] * 2
    assert not any(word.startswith("--no-") for word in calls[-1])


def test_a_failing_setup_leaves_no_compiler_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "pid"
    (tmp_path / "build_kernels.py").write_text(
        f"import os, time; open({str(started)!r} + '~', 'w').write(str(os.getpid()))\n"
        f"os.replace({str(started)!r} + '~', {str(started)!r}); time.sleep(1000)"
    )
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)

    def set_up() -> None:
        with bootstrap.kernels_meanwhile():
            while not started.exists():
                time.sleep(0.01)
            bootstrap.fail("no")

    with pytest.raises(SystemExit):
        set_up()
    assert not Path("/proc", started.read_text()).exists()


def test_flags_of_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "is_open_mpi", lambda mpirun: True)
    monkeypatch.setattr(bootstrap, "cores", lambda: 2)
    assert "mpi_yield_when_idle" not in bootstrap.mpirun_command("mpirun", 2)
    assert "mpi_yield_when_idle" in bootstrap.mpirun_command("mpirun", 3)
    monkeypatch.setattr(bootstrap, "is_open_mpi", lambda mpirun: False)
    assert bootstrap.mpirun_command("mpirun", 3) == ["mpirun", "-n", "3"]


@pytest.mark.parametrize(("user", "consents"), [(0, True), (1000, False)])
def test_consent_to_run_as_root(monkeypatch: pytest.MonkeyPatch, user: int, consents: bool) -> None:
    monkeypatch.setattr(bootstrap.os, "geteuid", lambda: user)
    environment = bootstrap.mpirun_environment({"HOME": "/"})
    assert environment["HOME"] == "/"
    assert ("OMPI_ALLOW_RUN_AS_ROOT" in environment) is consents


def test_no_way_to_an_environment_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for way in ("_by_venv", "_by_virtualenv", "_by_apt"):
        monkeypatch.setattr(bootstrap, way, lambda where: "no")
    with pytest.raises(SystemExit) as stop:
        bootstrap.make_environment(tmp_path / "v")
    assert stop.value.code == 2
    assert "apt-get install python3-venv" in capsys.readouterr().err.splitlines()[-1]


def test_system_mpi_without_mpirun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        bootstrap.main(["--system-mpi", "train"])
    assert stop.value.code == 2
    assert "no mpirun on PATH" in capsys.readouterr().err


def test_the_file_is_for_old_pythons() -> None:
    """Python 3.6, which is `python3` of many clusters, is to say that it is too old."""
    text = (bootstrap.ROOT / "tools" / "bootstrap.py").read_text()
    tree = ast.parse(text, feature_version=(3, 6))
    assert not [node for node in ast.walk(tree) if getattr(node, "module", "") == "__future__"]
    # What is not in quotes would be evaluated, and cannot be there.
    given = [
        each
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for each in (node.returns, *(argument.annotation for argument in node.args.args))
    ]
    assert not [each for each in given if isinstance(each, ast.Subscript | ast.BinOp)]


def test_a_newer_python_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that works: pyenv, for one, has programs that only tell that they are not active."""
    shim = doctor.script(tmp_path, "python3.11", "echo not active >&2; exit 127")
    newer = doctor.script(tmp_path, "python3.12", f'exec {sys.executable} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2, "final", 0))
    calls: list[list[str]] = []

    def execv(path: str, command: list[str]) -> None:
        calls.append(command)
        raise StartedError

    monkeypatch.setattr(bootstrap.os, "execv", execv)
    with pytest.raises(StartedError):
        bootstrap.main(["setup", "--extras", "test"])
    script = str(bootstrap.ROOT / "tools" / "bootstrap.py")
    assert calls == [[str(newer), script, "setup", "--extras", "test"]]
    assert f"Python 3.9.2, which is too old; taking {newer}" in capsys.readouterr().err
    for each in (shim, newer):
        each.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        bootstrap.main(["setup"])
    assert stop.value.code == 2
    assert "no newer one is on PATH: load your site's" in capsys.readouterr().err


def test_mpirun_has_a_home() -> None:
    for env in ({}, {"HOME": ""}):
        assert bootstrap.mpirun_environment(env)["HOME"] == os.path.expanduser("~")
    assert bootstrap.mpirun_environment({"HOME": "/there"})["HOME"] == "/there"
