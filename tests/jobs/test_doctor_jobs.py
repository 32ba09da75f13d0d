"""The doctor as users start it: its reports, alone and of several ranks, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpcsync.doctor import checks
from tests import launcher
from tests.doctor import (
    ROOT,
    findings,
    module,
    needs_mpi,
    script,
)

pytestmark = pytest.mark.timeout(300)


@needs_mpi
def test_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpcsync.doctor", "--json"],
        cwd=ROOT,
        env=launcher.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_status"], done.stderr
    assert (report["ranks"], report["heard"]) == (1, 1)
    checked = {each["check"] for each in report["findings"]}
    assert checked == set(checks.ORDER) - {"nodes", "alike"}
    for each in report["findings"]:
        assert (each["status"] == "PASS") == (not each["fix"]), each
        assert "\n" not in each["why"] + each["fix"]


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 4])
def test_rank_0_reports_for_all(ranks: int) -> None:
    only = "mpi,mpirun,limits,hosts,nodes,alike,cores,signals"
    outcome = launcher.run(ranks, "-m", "hpcsync.doctor", "--json", "--only", only, timeout=240)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    assert outcome.stdout.count('"format"') == 1
    report = json.loads(outcome.stdout)
    assert (report["ranks"], report["heard"]) == (ranks, ranks)
    found = findings(outcome.stdout)
    assert found["limits"]["ranks"] == list(range(ranks))
    assert found["hosts"]["ranks"] == [0], "one rank of a node makes its checks"
    assert found["nodes"]["why"] == f"{ranks} ranks on 1 node (1 x {ranks})"
    assert found["mpirun"]["why"] == "started by mpirun"


@needs_mpi
def test_a_fault_of_one_rank_is_told_with_its_rank(tmp_path: Path) -> None:
    low = script(tmp_path, "low", '[ "$OMPI_COMM_WORLD_RANK" = 1 ] && ulimit -S -n 200; exec "$@"')
    words = ["-m", "hpcsync.doctor", "--only", "limits"]
    command = [*launcher.mpirun(2), str(low), sys.executable, *words]
    outcome = launcher.Job(command).wait(240)
    outcome.assert_clean()
    assert outcome.status == 0, outcome.describe()
    (line,) = (line for line in outcome.stdout.splitlines() if "WARN" in line)
    assert "at most 200 open files" in line
    assert "[rank 1 on " in line


@needs_mpi
def test_a_failure_is_an_exit_status() -> None:
    words = ["-m", "hpcsync.doctor", "--only", "folder", "run.dir=/proc/runs"]
    assert launcher.run(0, *words, timeout=240).status == 1
    outcome = launcher.run(2, *words, timeout=240)
    outcome.assert_clean()
    assert outcome.status == 1, outcome.describe()
    assert outcome.stdout.count("  FAIL  folder") == 1


@needs_mpi
def test_wrong_words_are_told_once() -> None:
    outcome = launcher.run(2, "-m", "hpcsync.doctor", "train.stesp=3", timeout=240)
    outcome.assert_clean()
    assert outcome.status == 2, outcome.describe()
    assert outcome.stderr.count("hpcsync: error: ") == 1, outcome.describe()


@needs_mpi
def test_a_rank_whose_mpi_dies(tmp_path: Path) -> None:
    """It tells so itself; rank 0 reports what it knows once its patience is over."""
    code = (
        "import os, sys\n"
        "if os.environ.get('OMPI_COMM_WORLD_RANK') == '1' and 'world' in str(sys.orig_argv):\n"
        "    os.abort()\n"
    )
    env = {"PYTHONPATH": f"{ROOT}:{module(tmp_path, 'sitecustomize', code)}"}
    words = ["-m", "hpcsync.doctor", "--only", "mpi,limits", "--limit", "4"]
    outcome = launcher.Job([*launcher.mpirun(2), sys.executable, *words], env=env).wait(240)
    assert not outcome.timed_out, outcome.describe()
    assert outcome.status != 0
    assert "  FAIL  mpi " in outcome.stdout, outcome.describe()
    assert outcome.stdout.count("  PASS  limits") == 1, outcome.describe()


@needs_mpi
@pytest.mark.parametrize(
    ("ranks", "number"), [(0, signal.SIGINT), (0, signal.SIGKILL), (2, signal.SIGTERM)]
)
def test_nothing_stays_behind_when_it_is_ended(
    tmp_path: Path, ranks: int, number: signal.Signals
) -> None:
    """While its child hangs in MPI."""
    began = tmp_path / "began"
    code = f"import time\nopen({str(began)!r}, 'w').close()\ntime.sleep(600)"
    fake = module(tmp_path, "mpi4py.MPI", code)
    command = [sys.executable, "-m", "hpcsync.doctor", "--only", "mpi", "--limit", "300"]
    start = launcher.mpirun(ranks) if ranks else []
    job = launcher.Job([*start, *command], env={"PYTHONPATH": f"{ROOT}:{fake}"})
    job.wait_until(began.exists)
    job.signal(number)
    outcome = job.wait(60)
    outcome.assert_clean()
    assert "Traceback" not in outcome.text
    if not ranks:
        assert outcome.status == (130 if number == signal.SIGINT else -number)
