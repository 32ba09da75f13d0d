"""Faults planted in whole jobs are found by name in their traces; files outlive a killed rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcsync import trace
from tests import launcher

pytestmark = pytest.mark.usefixtures("mpi")

MODULE = '''
import os, signal, time
from torch import nn
from hpcsync import data
from hpcsync.data import digits
from hpcsync.models import mlp

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
FAULT = os.environ.get("FAULT", "")


class Model(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, inputs, targets):
        self.calls += 1
        if FAULT == "forward" and RANK == 1:
            time.sleep(0.08)
        if FAULT == "kill" and RANK == 1 and self.calls == 30:
            time.sleep(5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.04)  # so that noise of the machine is small beside it
        return self.inner(inputs, targets)


class Slow:
    """Batches that take their time."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def train_batch(self, indices):
        time.sleep(0.12 if FAULT == "data" else 0.0)
        return self._source.train_batch(indices)


def model(config, source):
    return Model(mlp.build(config, source))


def samples(*args, **keywords):
    return Slow(digits.build(*args, **keywords))
'''
WORDS = (
    *("model.name=faulty:model", "data.name=faulty:samples", "model.layers=2", "model.hidden=32"),
    *("train.steps=40", "train.global_batch=8", "train.eval_every=0", "trace.every=1"),
)


def job(folder: Path, fault: str, ranks: int = 2) -> launcher.Outcome:
    (folder / "faulty.py").write_text(MODULE)
    words = [*WORDS, "topology.ranks_per_node=1", "--out", str(folder / "run")]
    return launcher.run(
        ranks, "-m", "hpcsync.train", *words, cwd=folder, env={"FAULT": fault}, timeout=120
    )


def summary(run: Path) -> dict[str, Any]:
    """What tools/trace.py says of it."""
    tool = launcher.ROOT / "tools" / "trace.py"
    done = subprocess.run(
        [sys.executable, str(tool), "summary", str(run), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def faults(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in found["findings"] if each["fault"]]


def test_a_clean_run_has_no_fault(tmp_path: Path) -> None:
    outcome = job(tmp_path, "")
    assert outcome.status == 0, outcome.describe()
    assert faults(summary(tmp_path / "run")) == []


def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    outcome = job(tmp_path, "forward")
    assert outcome.status == 0, outcome.describe()
    found = summary(tmp_path / "run")
    (fault,) = faults(found)
    assert (fault["kind"], fault["ranks"], fault["lane"]) == ("straggler", "1", "forward")
    assert 40 < fault["lost_ms"] < 160


def test_slow_data_is_named(tmp_path: Path) -> None:
    outcome = job(tmp_path, "data")
    assert outcome.status == 0, outcome.describe()
    assert [fault["kind"] for fault in faults(summary(tmp_path / "run"))] == ["data"]


def test_files_outlive_a_killed_rank(tmp_path: Path) -> None:
    outcome = job(tmp_path, "kill")
    assert outcome.status != 0
    with trace.open(tmp_path / "run") as found:
        assert found.ranks == (0, 1)
        assert not found.complete
        for rank in found.ranks:
            assert found.steps(rank).shape[0] > 10
