"""The doctor where it is started oddly: without a home, a folder, a reader, or enough time."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcsync.doctor import mpi
from hpcsync.doctor.base import System
from tests import launcher
from tests.doctor import doctor, findings, mended, mended_here, provokes, script, shell


@provokes("kernels.slow", "hdf5.slow", "mpi.slow")
@pytest.mark.parametrize("code", ["kernels.slow", "hdf5.slow", "mpi.slow"])
def test_a_time_limit_that_is_too_short(code: str) -> None:
    """Which says nothing of what is installed: the advice is no other package."""
    words = ["--json", "--only", code.partition(".")[0], "--limit", "0.001"]
    mended(code, command=doctor(*words), fix=f"{sys.executable} -m hpcsync.doctor")


@provokes("mpirun.home")
def test_without_a_home(tmp_path: Path) -> None:
    """An mpirun that answers as Open MPI's does."""
    library = tmp_path / "lib" / "libmpi.so.40"
    library.parent.mkdir()
    library.touch()
    script(
        tmp_path / "bin",
        "mpirun",
        "[ -n \"$HOME\" ] || { echo 'Error: Unable to get the user home directory' >&2; exit 1; }",
    )
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    check = functools.partial(mpi.launcher, path=str(library))
    found = mended_here(check, "mpirun.home", System(env=env, user=1000))
    assert "HOME is not set" in found.why


def test_mpi_starts_without_a_home() -> None:
    script = f"unset HOME; {doctor('--json', '--only', 'mpi')}"
    assert findings(shell(script))["mpi"]["status"] == "PASS"


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        f"cd {gone} && rmdir {gone} && {doctor('--only', 'folder,hdf5')}",
        shell=True,
        env={**launcher.environment(), "PYTHONPATH": str(launcher.ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("hpcsync: error: the current folder cannot be read (")
    assert "Traceback" not in done.stderr


def test_the_same_command_again_has_each_option_once() -> None:
    words = ("python", "-m", "hpcsync.doctor", "--only", "folder,hdf5", "--limit", "9", "run.dir=a")
    system = System(command=words)
    assert system.again("run.dir=b") == (
        "python -m hpcsync.doctor --only folder,hdf5 --limit 9 run.dir=b"
    )
    assert system.again("--only", "shm", "--debug") == (
        "python -m hpcsync.doctor --limit 9 run.dir=a --only shm --debug"
    )
    debugged = System(command=(*words[:3], "--debug", "laptop"))
    assert debugged.again("--only", "shm", "--debug") == (
        "python -m hpcsync.doctor laptop --only shm --debug"
    )


def test_ranks_tell_an_error_of_the_command_line_once() -> None:
    for rank, told in (("0", 1), ("1", 0)):
        ranked = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        done = subprocess.run(
            [sys.executable, "-m", "hpcsync.doctor", "--jsn"],
            env={**os.environ, **ranked, "OMPI_COMM_WORLD_SIZE": "2"},
            cwd=launcher.ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.count("unrecognized arguments: --jsn; --help lists") == told
