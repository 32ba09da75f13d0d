"""Faults planted in jobs on a cluster of three nodes are found by name, and no others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import launcher
from tools.vcluster import VirtualCluster

pytestmark = pytest.mark.cluster

MODULE = '''
import os, time
from torch import nn
from hpcsync.collectives.collective import Segment
from hpcsync.models import mlp
from hpcsync.transports.base import Wait

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
FAULT = os.environ.get("FAULT", "")


class Model(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        if FAULT == "hook" and RANK == 1:
            inner.layers[1][0].weight.register_hook(lambda grad: time.sleep(0.06))

    def forward(self, inputs, targets):
        time.sleep(0.04 + (0.06 if FAULT == "forward" and RANK == 1 else 0.0))
        return self.inner(inputs, targets)


class Held(Wait):
    """For a while."""

    def __init__(self, seconds):
        self.until = time.perf_counter() + seconds

    def ready(self):
        return time.perf_counter() > self.until

    def describe(self):
        return "held back"


def held_back(run):
    def held(self):
        if self._collective.bucket == 1:
            yield Held(0.06)
        yield from run(self)

    return held


if FAULT == "queue" and RANK == 1:
    Segment.run = held_back(Segment.run)


def model(config, source):
    return Model(mlp.build(config, source))
'''
WORDS = (
    *("model.name=faulty:model", "data.name=digits", "model.layers=3", "model.hidden=256"),
    *("train.steps=40", "train.global_batch=12", "train.eval_every=0", "trace.every=1"),
    *("comm.bucket_mb=0.3", "comm.first_bucket_mb=0.1"),
)
CLOCK = 'exec unshare --time --monotonic 2 --fork --kill-child "$@"'


def run(cluster: VirtualCluster, folder: Path, fault: str = "") -> dict[str, Any]:
    """What tools/trace.py says of a job of one rank a node with that fault."""
    (folder / "faulty.py").write_text(MODULE)
    command = [sys.executable, "-m", "hpcsync.train", *WORDS, "--out", str(folder / "run")]
    if fault == "clock":
        script = f'[ "$(hostname)" = node1 ] && {CLOCK}; exec "$@"'
        command = ["sh", "-c", script, "sh", *command]
    done = cluster.run_mpi(
        command,
        cwd=str(folder),
        env=launcher.environment({"FAULT": fault}),
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tool = [sys.executable, str(launcher.ROOT / "tools" / "trace.py"), "summary"]
    told = subprocess.run(
        [*tool, str(folder / "run"), "--json"], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def faults(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in found["findings"] if each["fault"]]


def test_a_clean_run_has_no_fault(tmp_path: Path) -> None:
    with VirtualCluster(3, "1gbit") as cluster:
        found = run(cluster, tmp_path)
    assert faults(found) == []


@pytest.mark.parametrize("node", [0, 2])
def test_a_slow_link_is_named_by_its_node(tmp_path: Path, node: int) -> None:
    with VirtualCluster(3, "1gbit") as cluster:
        cluster.set_rate("100mbit", f"node{node}")
        found = run(cluster, tmp_path)
    (fault,) = faults(found)
    assert (fault["kind"], fault["node"]) == ("link", node)
    assert found["verdict"]["bound"] == "communication"
    assert f"link of node {node} is slow" in found["verdict"]["text"]


def test_a_clock_that_is_off_is_told_and_makes_no_straggler(tmp_path: Path) -> None:
    with VirtualCluster(3, "1gbit") as cluster:
        found = run(cluster, tmp_path, "clock")
    (fault,) = faults(found)
    assert (fault["kind"], fault["ranks"]) == ("clock", "1")
    assert "clock of rank 1 is 2.0" in fault["text"]
    assert "ahead of the others'; times are corrected" in fault["text"]
    assert found["arrival"]["spread_ms"] < 1000


@pytest.mark.parametrize("fault", ["hook", "queue"])
def test_a_bucket_that_is_held_back_is_named(tmp_path: Path, fault: str) -> None:
    """By a hook in the backward pass, or on its way out."""
    with VirtualCluster(3, "1gbit") as cluster:
        found = run(cluster, tmp_path, fault)
    (told,) = faults(found)
    assert (told["kind"], told["ranks"], told["bucket"]) == ("bucket", "1", 1)


def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    with VirtualCluster(3, "1gbit") as cluster:
        found = run(cluster, tmp_path, "forward")
    (fault,) = faults(found)
    assert (fault["kind"], fault["ranks"], fault["lane"]) == ("straggler", "1", "forward")
