"""The two commands of the README: what they install, and what they start."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

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
    monkeypatch.setattr(bootstrap, "install", lambda python, extras: calls.append(extras))
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
    assert started[0][1:] == ["-m", "pytest", "-k", "plan", "-x"]
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
    names = ("constraints.txt", "pyproject.toml", "setup.py")
    for path in (*(tmp_path / name for name in names), source):
        path.write_text("1")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: None)
    digests = [bootstrap.fingerprint()]
    assert bootstrap.fingerprint() == digests[0]
    source.write_text("2")
    digests.append(bootstrap.fingerprint())
    source.rename(source.with_name("adds.cpp"))
    digests.append(bootstrap.fingerprint())
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: f"/bin/{name}")
    digests.append(bootstrap.fingerprint())
    assert len(set(digests)) == len(digests)


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
