"""The doctor finds an MPI that does not work and ranks that do not meet; its commands mend both."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests import launcher
from tests.doctor import (
    ROOT,
    Sandbox,
    doctor,
    findings,
    has_own_mpi,
    mended,
    module,
    mpirun,
    needs_mpi,
    needs_root,
    provokes,
    script,
    shell,
)

pytestmark = pytest.mark.timeout(300)


@needs_mpi
@provokes("mpi.missing")
def test_mpi_library_that_is_not_there() -> None:
    found = mended("mpi.missing", "export MPI4PY_LIBMPI=/nowhere/libmpi.so", fix="unset")
    assert "/nowhere/libmpi.so" in found["why"]


@needs_mpi
@pytest.mark.skipif(not has_own_mpi(), reason="MPI is no wheel here: pip install 'hpcsync[mpi]'")
@provokes("mpi.missing")
def test_mpi_library_beside_mpirun(tmp_path: Path) -> None:
    """In an environment without the wheel, but with its mpirun on PATH."""
    python = Sandbox(tmp_path / "sandbox").python
    command = doctor("--json", "--only", "mpi", python=python)
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    mended("mpi.missing", "", command, fix="export MPI4PY_LIBMPI=", env={"PATH": path})


@needs_mpi
@provokes("mpi.threads")
def test_thread_level() -> None:
    setup = "export MPI4PY_RC_THREAD_LEVEL=funneled"
    found = mended("mpi.threads", setup, fix="unset MPI4PY_RC_THREAD_LEVEL")
    assert "THREAD_FUNNELED" in found["why"]


FAKE_MPI = """
import os, time
if os.environ.get("OMPI_MCA_pml") != "ob1":
    {fault}
THREAD_SINGLE, THREAD_FUNNELED, THREAD_SERIALIZED, THREAD_MULTIPLE = range(4)
def Query_thread(): return THREAD_MULTIPLE
def Get_library_version(): return "Fake MPI 1.0"
class Comm:
    def Get_size(self): return 1
COMM_WORLD = Comm()
"""


@pytest.mark.parametrize(
    ("code", "fault"), [("mpi.stuck", "time.sleep(600)"), ("mpi.broken", "os.abort()")]
)
@provokes("mpi.stuck", "mpi.broken")
def test_mpi_that_does_not_start(tmp_path: Path, code: str, fault: str) -> None:
    """As with a network that MPI tries, and that the fix leaves out."""
    fake = module(tmp_path, "mpi4py.MPI", FAKE_MPI.format(fault=fault))
    command = doctor("--json", "--only", "mpi", "--limit", "8")
    mended(code, "", command, fix="export OMPI_MCA_pml=ob1", env={"PYTHONPATH": f"{ROOT}:{fake}"})


@provokes("mpi.login")
def test_mpi_that_starts_in_a_job_only(tmp_path: Path) -> None:
    """A login node of a stand-in for Slurm, whose nodes have what MPI needs."""
    fake = module(tmp_path, "mpi4py.MPI", FAKE_MPI.format(fault="os.abort()"))
    listed = "if [ $1 = --mpi=list ]; then printf 'MPI plugin types are...\\n\\tpmix\\n'; exit; fi"
    run = '[ "$1 $2 $3" = "--mpi=pmix -n 1" ] && shift 3'
    job = 'SLURM_JOB_ID=7 OMPI_MCA_pml=ob1 exec "$@"'
    script(tmp_path / "bin", "srun", f"{listed}\n{run}\n{job}")
    env = {
        "PYTHONPATH": f"{ROOT}:{fake}",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_CONF": "/x",
    }
    found = mended("mpi.login", fix="srun --mpi=pmix -n 1 ", env=env)
    assert found["status"] == "WARN"


@needs_mpi
@provokes("mpirun.missing")
def test_no_mpirun(tmp_path: Path) -> None:
    for name in ("sh", "env", "srun", "mkdir"):
        if shutil.which(name):
            (tmp_path / name).symlink_to(shutil.which(name))
    setup = "export PATH=/usr/bin:/bin"
    if shutil.which("mpirun", path="/usr/bin:/bin"):
        setup = f"export PATH={tmp_path}"
    mended("mpirun.missing", setup, fix="export PATH=")


@needs_mpi
@provokes("mpirun.other")
def test_mpirun_of_another_mpi(tmp_path: Path) -> None:
    script(tmp_path / "bin", "mpirun", "exit 1")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so.40").touch()
    setup = f"export PATH={tmp_path}/bin:$PATH"
    found = mended("mpirun.other", setup, fix="export PATH=")
    assert str(tmp_path / "bin" / "mpirun") in found["why"]


@needs_mpi
@needs_root
@provokes("mpirun.root")
def test_mpirun_as_root() -> None:
    setup = "unset OMPI_ALLOW_RUN_AS_ROOT OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"
    mended("mpirun.root", setup, fix="export OMPI_ALLOW_RUN_AS_ROOT=1 ")


SINGLETONS = """
case "$1" in
--mpi=list) printf 'MPI plugin types are...\\n\\tnone\\n{listed}' ;;
*) if [ "$SLURM_MPI_TYPE" = pmix ]; then exec {mpirun} "$@"; fi
   for rank in 0 1; do
       SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=$rank SLURM_JOB_ID=7 "$@"
   done ;;
esac
"""


@needs_mpi
@pytest.mark.parametrize("listed", ["\\tpmi2\\n\\tpmix\\n", ""], ids=["pmix", "none"])
@provokes("launch.singletons")
def test_srun_that_starts_singletons(tmp_path: Path, listed: str) -> None:
    """A stand-in for srun, whose ranks meet by PMIx only; a real one is in tests/slurm."""
    path = f"{tmp_path}:{Path(launcher.find_mpirun() or '').parent}:{os.environ['PATH']}"
    script(tmp_path, "srun", SINGLETONS.format(mpirun=mpirun(2), listed=listed))
    command = f"srun {doctor('--json', '--only', 'launch,nodes')}"
    found = findings(shell(command, {"PATH": path}))["launch.singletons"]
    assert found["status"] == "FAIL"
    assert "started 2 processes" in found["why"]
    begins = "export SLURM_MPI_TYPE=pmix" if listed else f"{Path(sys.prefix)}/bin/mpirun -n 2 "
    assert found["fix"].startswith(begins) or not has_own_mpi()
    then = command if listed else ""
    allowed = "export PRTE_MCA_rmaps_default_mapping_policy=:OVERSUBSCRIBE"
    after = findings(shell(f"{allowed}\n{found['fix']}\n{then}", {"PATH": path}))
    assert after["nodes"]["why"] == "2 ranks on 1 node (1 x 2)"
    assert after["launch"]["why"] == "2 ranks found each other"


@needs_mpi
@provokes("launch.size")
def test_ranks_that_are_not_all_there(tmp_path: Path) -> None:
    more = script(tmp_path, "more", 'OMPI_COMM_WORLD_SIZE=3 exec "$@"')
    command = doctor("--json", "--only", "launch,nodes")
    found = findings(shell(f"{mpirun(2)} {more} {command}"))["launch.size"]
    assert found["why"] == "mpirun started 3 ranks, but MPI sees 2"
    # As the fix says, with the flags that few cores need.
    after = findings(shell(f"{mpirun(3)} {found['fix'].partition(' -n 3 ')[2]}"))
    assert after["launch"]["why"] == "3 ranks found each other"
    assert after["nodes"]["why"] == "3 ranks on 1 node (1 x 3)"
