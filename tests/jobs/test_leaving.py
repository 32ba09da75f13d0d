"""SIGUSR2, as a batch script sends it before the time limit: save, leave, be resumed."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from hpcsync import checkpoint
from tests import launcher

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(280)]

TINY = (
    *("train.steps=60", "train.global_batch=12", "train.eval_every=1", "train.eval_batches=1"),
    *("model.layers=1", "model.width=32", "model.heads=2", "model.context=16"),
    *("data.options={max_mb=0.5}", "trace.enabled=false"),
    *("checkpoint.every=0", "checkpoint.at_end=false", "--resume", "auto"),
)


def start(folder: Path, *more: str) -> launcher.Job:
    given = {word.partition("=")[0] for word in more}
    kept = [word for word in TINY if word.partition("=")[0] not in given]
    words = ["-m", "hpcsync.train", *kept, "--out", str(folder), *more]
    return launcher.Job([*launcher.mpirun(2), sys.executable, *words])


def rows(folder: Path) -> list[dict[str, str]]:
    try:
        with (folder / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def curve(folder: Path) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in ("step", "loss", "val_loss")) for row in rows(folder)]


def wait_for_steps(job: launcher.Job, folder: Path, least: int) -> None:
    until = time.monotonic() + 120
    while len(rows(folder)) < least:
        waiting = time.monotonic() < until and job.process.poll() is None
        assert waiting, job.wait(0.1).describe()
        time.sleep(0.005)


def leave(job: launcher.Job) -> launcher.Outcome:
    """Told to one rank only: all of them agree."""
    ranks = [pid for pid, line in job.processes().items() if "mpirun" not in line.split()[0]]
    os.kill(ranks[-1], signal.SIGUSR2)
    outcome = job.wait(120)
    outcome.assert_clean()
    return outcome


def test_who_leaves_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    outcome = start(whole, "checkpoint.at_end=true").wait(120)
    assert outcome.status == 0, outcome.describe()
    job = start(broken)
    wait_for_steps(job, broken, 5)
    outcome = leave(job)
    assert outcome.status == 75, outcome.describe()
    assert "stopped by SIGUSR2, to be resumed" in outcome.stderr
    done = len(rows(broken))
    assert 5 <= done < 60
    assert (broken / "checkpoints" / "latest").read_text() == f"step-{done:08d}\n"
    summary = json.loads((broken / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", done)
    outcome = start(broken, "checkpoint.at_end=true").wait(120)
    assert outcome.status == 0, outcome.describe()
    assert f"goes on after step {done}" in outcome.stderr
    assert curve(broken) == curve(whole)
    name = "checkpoints/step-00000060"
    with checkpoint.open(whole / name) as one, checkpoint.open(broken / name) as other:
        assert list(one.manifest.tensors) == list(other.manifest.tensors)
        for tensor in one.manifest.tensors:
            assert torch.equal(one.tensor(tensor), other.tensor(tensor)), tensor


def test_who_could_not_save_says_so(tmp_path: Path) -> None:
    made = tmp_path / "made"
    job = start(made, "train.steps=100000")
    wait_for_steps(job, made, 3)
    (made / "checkpoints").write_text("in the way")
    outcome = leave(job)
    assert outcome.status == 3, outcome.describe()
    assert "the last checkpoint was not saved" in outcome.stderr
