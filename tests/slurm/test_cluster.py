"""The cluster that the other tests here use: its nodes are hosts, and nothing of it is left."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import launcher
from tests.slurm.cluster import SlurmCluster, SlurmError

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


KILLED = """
from pathlib import Path
from tests.slurm.cluster import SlurmCluster
with SlurmCluster(nodes=1) as cluster:
    job = cluster.submit("--output=%x-%j.log", "sleep.sh", cwd=Path())
    job.wait_for(lambda: "began" in job.log())
    print(cluster.folder, cluster.mark, job.mark, flush=True)
    input()
"""


def test_nothing_is_left_when_who_started_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "sleep.sh").write_text("#!/bin/sh\necho began\nsrun sleep 600\n")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED],
        env=launcher.environment(),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        folder, *marks = process.stdout.readline().split()
        assert all(launcher.processes(mark) for mark in marks)
        process.kill()
    until = time.monotonic() + 60
    while any(launcher.processes(mark) for mark in marks) or Path(folder).exists():
        assert time.monotonic() < until, [launcher.processes(mark) for mark in marks]
        time.sleep(0.1)


def test_a_daemon_that_has_ended_is_told_at_once() -> None:
    with SlurmCluster(nodes=1) as cluster:
        cluster._daemons[0].kill()
        cluster._daemons[0].wait()
        with pytest.raises(SlurmError, match="munged"):
            cluster._wait(lambda: False, 600.0, "never")
