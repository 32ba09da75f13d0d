"""The doctor in real Slurm jobs: what it finds there, and that its fixes help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpcsync.doctor.base import System
from hpcsync.doctor.slurm import slurm as check
from tests.doctor import doctor, findings, provokes
from tests.slurm.cluster import SlurmCluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.usefixtures("mpi"),
    pytest.mark.timeout(300),
]


def job(cluster: SlurmCluster, folder: Path, text: str, *options: str) -> dict[str, dict[str, Any]]:
    """The doctor's findings in a batch job whose script is ``text``, by code."""
    number = len(list(folder.glob("job-*.sh")))
    script, output = folder / f"job-{number}.sh", folder / f"job-{number}.json"
    script.write_text(f"#!/bin/bash\nexec >{output}\n{text}\n")
    submitted = cluster.submit(*options, str(script), cwd=folder)
    submitted.wait()
    assert output.exists(), submitted.describe()
    return findings(output.read_text())


@provokes("launch.singletons")
def test_srun_without_a_plugin(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The cluster's default is none: each rank is alone, told once, and the fix brings them
    together."""
    two = ("--nodes=2", "--ntasks-per-node=1")
    command = f"srun {doctor('--json', '--only', 'launch,nodes')}"
    found = job(slurm, tmp_path, command, *two)["launch.singletons"]
    assert found["status"] == "FAIL"
    assert "srun started 2 processes" in found["why"]
    assert found["fix"] == "export SLURM_MPI_TYPE=pmix"
    after = job(slurm, tmp_path, f"{found['fix']}\n{command}", *two)
    assert "launch.singletons" not in after
    assert after["nodes"]["why"] == "2 ranks on 2 nodes (2 x 1)"


@provokes("slurm.default", "slurm.requeue")
def test_defaults_of_cluster_and_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    command = doctor("--json", "--only", "slurm")
    found = job(slurm, tmp_path, command, "--no-requeue")
    assert set(found) == {"slurm.default", "slurm.requeue"}
    # The job's number is another one each time.
    fix = found["slurm.requeue"]["fix"]
    words = [word if "JobId" not in word else "JobId=$SLURM_JOB_ID" for word in fix.split()]
    text = "\n".join([found["slurm.default"]["fix"], " ".join(words), command])
    after = job(slurm, tmp_path, text, "--no-requeue")
    assert after["slurm"]["status"] == "PASS", after
    assert "pmix" in after["slurm"]["why"]


def test_ranks_of_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    """All checks on both nodes; the run folder is in a folder that they share."""
    command = f"srun --mpi=pmix {doctor('--json', f'run.dir={tmp_path}/runs')}"
    found = job(slurm, tmp_path, command, "--nodes=2", "--ntasks-per-node=2", "--requeue")
    assert found["nodes"]["why"] == "4 ranks on 2 nodes (2 x 2)"
    assert found["mpi"]["status"] == "PASS"
    assert found["torch"]["ranks"] == [0, 2], "one rank of a node makes its checks"
    assert found["folder"]["status"] == "PASS"
    assert not any(path.name.startswith(".hpcsync-doctor") for path in tmp_path.iterdir())


@provokes("slurm.default", "slurm.silent")
def test_outside_a_job(slurm: SlurmCluster) -> None:
    """As on a login node, and on one that does not reach the cluster."""
    here = System(env=slurm.environment())
    assert [each.code for each in check(here)] == ["slurm.default"]
    lost = System(env={**here.env, "SLURM_CONF": "/nowhere/slurm.conf"})
    assert [each.code for each in check(lost)] == ["slurm.silent"]
