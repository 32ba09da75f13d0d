"""One node of a cluster is slowed, and preflight names it; what it saves serves later jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launcher
from tools import bench_preflight, quota
from tools.bench_preflight import Run
from tools.vcluster import VirtualCluster

pytestmark = pytest.mark.cluster

TINY = ("model.layers=1", "model.width=32", "model.heads=2", "model.context=32")


def reasons(found: Run, what: str) -> list[str]:
    """The nodes that are slow in something."""
    return [slow["name"] for slow in found.found["slow"] if slow["what"] == what]


@pytest.mark.parametrize("host", ["node0", "node2"])
def test_a_slow_link_is_named(host: str) -> None:
    with VirtualCluster(3, "100mbit") as cluster:
        found = bench_preflight.run(cluster, "link", host)
    assert reasons(found, "link") == [host]
    assert host in found.named
    assert found.found["levels"]["rail"]["faults"] == []


def test_a_slow_processor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := quota.missing():
        pytest.skip(f"{reason}: a cgroup file system that may be written is needed")
    monkeypatch.setattr(bench_preflight, "CORES", 0.1)
    with VirtualCluster(3, "100mbit") as cluster:
        found = bench_preflight.run(cluster, "compute", "node1")
    assert "node1" in reasons(found, "product")


def test_slow_memory_is_named() -> None:
    with VirtualCluster(3, "100mbit") as cluster:
        found = bench_preflight.run(cluster, "memory", "node2")
    assert "node2" in reasons(found, "memory")
    assert "node2" in found.named


def test_a_link_never_passes_more_than_its_shape() -> None:
    """How near it comes to it is what tools/bench_preflight.py measures."""
    with VirtualCluster(2, "100mbit") as cluster:
        found = bench_preflight.run(cluster, "clean", "")
    for _, _, least, most in bench_preflight.bandwidths([found], "100mbit"):
        assert 0 < float(least) <= float(most) < 1.05


def test_the_line_for_sbatch_and_the_status_name_the_node(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    words = [sys.executable, "-m", "hpcsync.preflight", "--save", str(path)]
    with VirtualCluster(3, "100mbit") as cluster:
        cluster.set_rate("10mbit", "node1")
        done = cluster.run_mpi(words, env={"PYTHONPATH": str(launcher.ROOT)}, timeout=200)
    assert done.returncode == 4, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("--exclude=")]
    assert "node1" in line.partition("=")[2].split(",")
    assert "slow: node1: link 1." in done.stdout
    assert not path.exists(), "costs with a slow node would mislead"
    assert "not saved" in done.stdout


def test_what_was_saved_serves_the_auto_choice_and_whatif(tmp_path: Path) -> None:
    path, run = tmp_path / "costs.json", tmp_path / "run"
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(launcher.ROOT)}
    flight = [sys.executable, "-m", "hpcsync.preflight", "--slow", "1e-9", "--save", str(path)]
    words = [sys.executable, "-m", "hpcsync.train", *TINY, f"comm.costs={path}", "train.steps=20"]
    words += ["train.eval_every=0", "compress.codec=auto", "trace.every=1", "--out", str(run)]
    with VirtualCluster(2, "100mbit") as cluster:
        done = cluster.run_mpi(flight, env=env, timeout=200)
        assert done.returncode == 0, done.stderr
        assert f"saved in {path}" in done.stdout
        done = cluster.run_mpi(words, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"auto: link as of {path}, preflight of " in done.stderr
    tool = [sys.executable, str(launcher.ROOT / "tools" / "trace.py"), "whatif", str(run)]
    told = subprocess.run([*tool, "--json"], capture_output=True, text=True, check=True)
    assumed = json.loads(told.stdout)["assumed"]
    assert any("the traced link costs what is known by preflight of" in line for line in assumed)
    told = subprocess.run(
        [*tool, "--json", "--costs", ""], capture_output=True, text=True, check=True
    )
    assert "preflight" not in told.stdout
