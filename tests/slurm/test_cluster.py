"""The cluster that the other tests here use: its nodes are hosts, and nothing of it is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import launcher
from tests.slurm.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_nodes_are_hosts(slurm: SlurmCluster) -> None:
    told = slurm.command("srun", "--nodes=3", "--ntasks=3", "hostname")
    assert sorted(told.split()) == ["node1", "node2", "node3"]


def test_nothing_is_left_of_a_cluster_with_a_job(tmp_path: Path) -> None:
    script = tmp_path / "sleep.sh"
    script.write_text("#!/bin/sh\necho began\nsrun sleep 600\n")
    with SlurmCluster(nodes=1) as cluster:
        job = cluster.submit("--output=%x-%j.log", str(script), cwd=tmp_path)
        job.wait_for(lambda: "began" in job.log())
        folder, marks = cluster.folder, (cluster.mark, job.mark)
        assert all(launcher.processes(mark) for mark in marks)
    assert not any(launcher.processes(mark) for mark in marks)
    assert not folder.exists()
