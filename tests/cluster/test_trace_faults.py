"""Faults planted in jobs on a cluster of three nodes are found by name, and no others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcsync.trace import hang
from hpcsync.trace.analysis import stuck
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
        self.inner, self.calls = inner, 0
        for at, layer in enumerate(inner.layers):
            long = 0.07 if (FAULT, RANK, at) == ("hook", 1, 1) else 0.01
            layer[0].weight.register_hook(takes(long))

    def forward(self, inputs, targets):
        self.calls += 1
        if FAULT == "stuck" and RANK == 1 and self.calls == 3:
            waits_here_for_ever()
        time.sleep(0.04 + (0.06 if FAULT == "forward" and RANK == 1 else 0.0))
        return self.inner(inputs, targets)


def takes(seconds):
    """A hook of a gradient, as long as the layer's computation would be."""
    return lambda grad: time.sleep(seconds)


def waits_here_for_ever():
    time.sleep(600)


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


def job(
    cluster: VirtualCluster, folder: Path, fault: str, *words: str
) -> subprocess.CompletedProcess[str]:
    """A job of one rank a node with that fault, or whose node1 has a clock that is 2 s ahead."""
    (folder / "faulty.py").write_text(MODULE)
    run = [sys.executable, "-m", "hpcsync.train", *WORDS, *words, "--out", str(folder / "run")]
    if "clock" in fault:
        run = ["sh", "-c", f'[ "$(hostname)" = node1 ] && {CLOCK}; exec "$@"', "sh", *run]
    env = launcher.environment({"FAULT": fault.removeprefix("clock ")})
    return cluster.run_mpi(run, cwd=str(folder), env=env, timeout=120)


def run(cluster: VirtualCluster, folder: Path, fault: str = "") -> dict[str, Any]:
    """What tools/trace.py says of a job with that fault."""
    done = job(cluster, folder, fault)
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


def test_a_rank_that_never_joins_is_named(tmp_path: Path) -> None:
    """By its stack; what its clock is off by stands in its dump."""
    with VirtualCluster(3, "1gbit") as cluster:
        done = job(cluster, tmp_path, "clock stuck", "comm.timeout_s=5")
    assert done.returncode != 0
    assert "waits_here_for_ever" in done.stderr, done.stderr
    dumps = hang.load(tmp_path / "run").dumps
    assert stuck.report(dumps, 3).missing == (1,)
    assert [round(dump.offset_ns / 1e9) for dump in dumps] == [0, -2, 0]
    assert [dump.step for dump in dumps] == [3, 3, 3]
