"""The launcher sees what it must: failures of any rank, ranks that hang, things left behind."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from tests import launcher

pytestmark = pytest.mark.usefixtures("mpi")

SUITE = """
import pytest
from mpi4py import MPI

world = MPI.COMM_WORLD

@pytest.mark.mpi
def test_it(comm):
    {body}
"""


def run_suite(tmp_path: Path, body: str, limit_s: int = 15) -> launcher.Outcome:
    """Run one test with the MPI suite's conftest on 2 ranks."""
    (tmp_path / "test_it.py").write_text(SUITE.format(body=body))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return launcher.run(
        2,
        *("-m", "pytest", str(tmp_path), "--rootdir", str(tmp_path), "--with-mpi"),
        *("-p", "tests.mpi.conftest", "-p", "no:cacheprovider", "--color=no"),
        f"--timeout={limit_s}",
        timeout=60,
    )


def test_failure_of_another_rank_is_shown_by_rank_0(tmp_path: Path) -> None:
    outcome = run_suite(tmp_path, "assert world.rank == 0, 'rank one is wrong'")
    outcome.assert_clean()
    assert outcome.status != 0
    assert "on rank [1]" in outcome.stdout, outcome.describe()
    assert "rank one is wrong" in outcome.stdout
    assert "1 failed" in outcome.stdout


def test_failure_while_others_wait_in_a_collective(tmp_path: Path) -> None:
    outcome = run_suite(tmp_path, "assert world.rank == 0, 'not I'; comm.Barrier()")
    outcome.assert_clean()
    assert outcome.status != 0
    assert "rank 1 failed in" in outcome.stderr, outcome.describe()
    assert "not I" in outcome.stderr


def test_a_rank_that_hangs_shows_its_stack(tmp_path: Path) -> None:
    outcome = run_suite(tmp_path, "world.rank == 1 and comm.recv(source=1)", limit_s=5)
    outcome.assert_clean()
    assert outcome.status != 0
    assert "Timeout" in outcome.text, outcome.describe()
    assert re.search(r'test_it.py", line \d+ in test_it', outcome.stderr), outcome.describe()


def test_processes_left_behind_are_seen_and_ended() -> None:
    code = """
import subprocess
null = subprocess.DEVNULL
subprocess.Popen(["sleep", "300"], stdout=null, stderr=null, start_new_session=True)
"""
    job = launcher.Job([sys.executable, "-c", code])
    outcome = job.wait(60, grace=0.5)
    assert "sleep" in outcome.processes_left[0]
    assert not job.processes()


def test_what_a_killed_mpirun_leaves_is_removed() -> None:
    """Open MPI's folder of a session, which would stop a later mpirun of the same process id."""
    command = launcher.mpirun(1)
    if not launcher.is_open_mpi(command[0]):
        pytest.skip("another MPI")
    job = launcher.Job([*command, "sleep", "300"])
    sessions = Path(job.environment[launcher.SESSIONS])
    job.wait_until(lambda: any(sessions.glob("*/pmix.*")))
    assert job.wait(0.1).timed_out
    assert not sessions.exists()
    assert not [*Path(tempfile.gettempdir()).glob(f"ompi.{job.process.pid}")]


def test_segments_left_behind_are_seen() -> None:
    name = f"{launcher.SHM_PREFIX}test-{uuid.uuid4().hex}"
    try:
        job = launcher.Job([sys.executable, "-c", f"open('/dev/shm/{name}', 'w').close()"])
        outcome = job.wait(60, grace=0.5)
        assert name in outcome.segments_left
        with pytest.raises(AssertionError, match="left in /dev/shm"):
            outcome.assert_clean()
    finally:
        os.unlink(f"/dev/shm/{name}")


def test_jobs_see_gpus_only_where_they_ask_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    told = ("-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    assert launcher.run(0, *told).stdout == "\n"
    assert launcher.run(0, *told, gpus=True).stdout == "3\n"
    assert launcher.run(0, *told, env={"CUDA_VISIBLE_DEVICES": "1"}).stdout == "1\n"


@pytest.mark.parametrize(("need", "status"), [("", 0), ("slurm", 4)])
def test_what_is_needed_is_not_skipped(tmp_path: Path, need: str, status: int) -> None:
    outcome = launcher.run(
        0,
        *("-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "tests/slurm"),
        env={"HPCSYNC_NEED": need, "PATH": str(tmp_path)},
    )
    assert outcome.status == status, outcome.describe()
    assert ("HPCSYNC_NEED names slurm, but slurmctld" in outcome.text) == bool(need)


STUCK = """
import os, sys, time
from pathlib import Path

first = Path(sys.argv[1])
if not first.exists() and os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    first.touch()
    time.sleep(600)  # the other rank waits for it within MPI_Init
from mpi4py import MPI
Path(sys.argv[2]).touch()
"""


@pytest.mark.parametrize("how", ["wait", "wait_until"])
def test_a_job_that_never_began_starts_again(tmp_path: Path, how: str) -> None:
    once, began = tmp_path / "once", tmp_path / "began"
    words = [sys.executable, "-c", STUCK, str(once), str(began)]
    job = launcher.Job([*launcher.mpirun(2), *words])
    if how == "wait_until":
        with pytest.warns(UserWarning, match="not started by its launcher"):
            job.wait_until(began.exists, timeout=5)
        outcome = job.wait(5)
    else:
        with pytest.warns(UserWarning, match="not started by its launcher"):
            outcome = job.wait(5)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    assert began.exists()


@pytest.mark.parametrize("how", ["wait", "wait_until"])
def test_a_job_that_hangs_by_itself_shows_its_stacks(how: str) -> None:
    wait = "MPI.COMM_WORLD.recv(source=1 - MPI.COMM_WORLD.rank)"
    code = f"from mpi4py import MPI\ndef stuck(): {wait}\nstuck()"
    job = launcher.Job([*launcher.mpirun(2), sys.executable, "-c", code])
    if how == "wait_until":
        with pytest.raises(AssertionError, match="in stuck"):
            job.wait_until(lambda: False, timeout=5)
        return
    outcome = job.wait(5)
    assert outcome.timed_out
    assert len(outcome.stuck) >= 3
    assert "in stuck" in outcome.describe()
    assert not outcome.never_began
