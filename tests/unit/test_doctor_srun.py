"""Slurm with faults, and fixes that start jobs by srun.

Each fault is found, its fix is followed as a shell would, and then the check passes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hpcsync.doctor.base import Finding, Status, System
from hpcsync.doctor.slurm import slurm
from tests.doctor import mended_here, provokes, script
from tests.faults import compared, joined, rank, system

SRUN = """
[ "$*" = --mpi=list ] || exit 1
printf 'MPI plugin types are...\\n\\tnone\\n{listed}'
"""
SCONTROL = """
if [ -e {folder}/down ]; then
    echo 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2
    exit 1
fi
case "$*" in
"show config") printf 'MpiDefault      = {default}\\nSLURM_VERSION   = 22.05.8\\n' ;;
"show job 7") printf 'JobId=7 JobName=x\\n   Requeue=%s Restarts=0\\n' "$(cat {folder}/requeue)" ;;
"update JobId=7 Requeue=1") echo 1 > {folder}/requeue ;;
esac
"""

Cluster = Callable[..., System]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """A fake Slurm: its plug-ins, its default, and what else is in the environment."""

    def make(listed: Sequence[str], default: str = "none", **env: str) -> System:
        folder = tmp_path / "slurm"
        lines = "".join(f"\\\\t{name}\\\\n" for name in listed).replace("\\\\", "\\")
        script(folder, "srun", SRUN.format(listed=lines))
        script(folder, "scontrol", SCONTROL.format(folder=folder, default=default))
        script(folder, "systemctl", f'[ "$1" = restart ] && rm {folder}/down')
        script(folder, "mpirun", 'OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 exec "$@"')
        (folder / "requeue").write_text("0")
        env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_CONF": "/x", **env}
        return system(env)

    return make


def test_slurm_that_is_well(cluster: Cluster) -> None:
    (found,) = slurm(cluster(["pmi2", "pmix", "pmix_v4"], "pmix"))
    assert found.status == Status.PASS
    assert found.why == "22.05.8, srun's MPI plug-ins: pmi2, pmix, pmix_v4"


def test_no_slurm(tmp_path: Path) -> None:
    (found,) = slurm(system({"PATH": str(tmp_path)}))
    assert (found.status, found.why) == (Status.PASS, "not here")


@provokes("slurm.default")
def test_srun_without_a_default(cluster: Cluster) -> None:
    here = cluster(["pmi2", "pmix"])
    mended_here(slurm, "slurm.default", here, fix="export SLURM_MPI_TYPE=pmix")


@provokes("slurm.unknown_plugin")
def test_srun_with_a_plugin_that_is_not_there(cluster: Cluster) -> None:
    here = cluster(["pmi2", "pmix"], SLURM_MPI_TYPE="openmpi")
    mended_here(slurm, "slurm.unknown_plugin", here, fix="export SLURM_MPI_TYPE=pmix")


@provokes("slurm.no_plugin")
def test_srun_without_plugins(cluster: Cluster) -> None:
    """The fix starts the doctor by mpirun; here it prints what that makes of its environment."""
    here = dataclasses.replace(cluster([]), command=("env",))

    def check(checked: System) -> list[Finding]:
        return list(slurm(checked))

    (found,) = check(here)
    assert (found.code, found.status, found.fix) == ("slurm.no_plugin", Status.WARN, "mpirun env")
    done = here.call("sh", "-c", found.fix)
    env = dict(line.split("=", 1) for line in done.out.splitlines() if "=" in line)
    (after,) = check(dataclasses.replace(here, env=env))
    assert after.status == Status.PASS


@provokes("slurm.silent")
def test_controller_that_does_not_answer(cluster: Cluster, tmp_path: Path) -> None:
    here = dataclasses.replace(cluster(["pmix"], "pmix"), user=0)
    (tmp_path / "slurm" / "down").touch()
    found = mended_here(slurm, "slurm.silent", here, fix="systemctl restart ")
    (tmp_path / "slurm" / "down").touch()
    (of_user,) = slurm(dataclasses.replace(here, user=1000))
    assert of_user.fix.startswith("sudo systemctl restart ")
    assert "Unable to contact slurm controller" in found.why


@provokes("slurm.requeue")
def test_job_that_is_not_requeued(cluster: Cluster) -> None:
    here = cluster(["pmix"], "pmix", SLURM_JOB_ID="7")
    mended_here(slurm, "slurm.requeue", here, fix="scontrol update JobId=7 Requeue=1")


@provokes("mpi.login")
def test_mpi_that_does_not_start_on_a_login_node(cluster: Cluster, tmp_path: Path) -> None:
    here = cluster(["pmi2", "pmix"])
    stage = '{"stage": "loading MPI"}'
    for status in (None, -11, 1):
        found = joined(here, stage, status=status)
        assert (found.code, found.status) == ("mpi.login", Status.WARN)
        assert found.fix == "srun --mpi=pmix -n 1 doctor"
    in_job = dataclasses.replace(here, env={**here.env, "SLURM_JOB_ID": "7"})
    assert joined(in_job, stage, status=None).code == "mpi.stuck"


@pytest.mark.parametrize(
    ("listed", "kind"),
    [(["pmi2", "pmix", "pmix_v4"], "pmix"), (["cray_shasta", "pmi2"], "cray_shasta"), ([], "pmix")],
)
def test_srun_in_fixes_keeps_its_plugin(cluster: Cluster, listed: list[str], kind: str) -> None:
    job = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"}
    every = [rank(0, "a"), rank(1, "a"), rank(2, "a"), rank(3, "b")]
    found = compared(cluster(listed, **job), every)["nodes.uneven"]
    assert found.fix == f"srun --mpi={kind} -n 4 --ntasks-per-node=2 doctor"
