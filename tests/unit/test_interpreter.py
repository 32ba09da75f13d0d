"""A Python that is too old, or is not that of hpcsync's environment: one line, on rank 0."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import hpcsync
from hpcsync import interpreter
from tests.doctor import ROOT

OLD = (
    "import runpy, sys\n"
    "sys.version_info = (3, 9, 2, 'final', 0)\n"
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


@pytest.fixture(autouse=True)
def in_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in interpreter._RANKS:
        monkeypatch.delenv(name, raising=False)


def ended(*words: str) -> str:
    """What a Python said that ended with status 2."""
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


@pytest.mark.parametrize("command", ["hpcsync.train", "hpcsync.preflight"])
def test_an_old_python_is_one_line(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = ended("-c", OLD, command)
    assert told.startswith("hpcsync: error: Python 3.9 is too old: hpcsync needs 3.11 or newer; `")
    assert told.endswith("`\n")
    assert told.count("\n") == 1
    monkeypatch.setenv("PMI_RANK", "1")
    assert not ended("-c", OLD, command)


@pytest.mark.parametrize("command", ["hpcsync.train", "hpcsync.preflight"])
def test_an_environment_that_is_not_active_is_one_line(command: str) -> None:
    told = ended("-S", "-m", command)  # without site: no packages
    assert f"Python: {sys.executable} has no mpi4py, numpy, torch: activate the envir" in told
    assert told.count("\n") == 1


def test_the_command_that_activates(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = interpreter._lacks(("json", "no_such_package"))
    assert "has no no_such_package: activate" in lacks
    assert lacks.endswith("activate`")
    monkeypatch.setattr("os.path.isfile", lambda name: name.endswith("activate"))
    assert interpreter._lacks(("no_such_package",)).endswith(
        f"the environment that hpcsync is in: `. {ROOT}/.venv/bin/activate`"
    )
    assert interpreter.fits("json", "pytest")


@pytest.mark.parametrize(
    "name",
    [
        *("__init__.py", "interpreter.py", "train.py", "preflight/__init__.py"),
        *("preflight/__main__.py", "doctor/__init__.py", "doctor/__main__.py", "doctor/oldest.py"),
    ],
)
def test_what_runs_before_parses_on_old_pythons(name: str) -> None:
    ast.parse((ROOT / "hpcsync" / name).read_text(), feature_version=(3, 7))


def test_a_library_on_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "complaint_here", lambda: ("too old", "newer"))
    with pytest.raises(ImportError, match=r"^too old; `newer`$"):
        getattr(hpcsync, "rank")  # noqa: B009
