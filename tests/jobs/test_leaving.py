"""SIGUSR2, as a batch script sends it before the time limit: save, leave, be resumed."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from hpcsync import checkpoint
from tests import launcher

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(280)]

TINY = (
    *("train.steps=60", "train.global_batch=12", "train.eval_every=1", "train.eval_batches=1"),
    *(
        "model.name=tests.paced:build",
        "model.layers=1",
        "model.width=32",
        "model.heads=2",
        "model.context=16",
    ),
    *("data.options={max_mb=0.5}", "trace.enabled=false"),
    *("checkpoint.every=0", "checkpoint.at_end=false", "--resume", "auto"),
)


def start(folder: Path, *more: str, pace_s: float = 0.0) -> launcher.Job:
    given = {word.partition("=")[0] for word in more}
    kept = [word for word in TINY if word.partition("=")[0] not in given]
    words = ["-m", "hpcsync.train", *kept, "--out", str(folder), *more]
    env = {"PACE_S": str(pace_s)}
    return launcher.Job([*launcher.mpirun(2), sys.executable, *words], env=env)


def rows(folder: Path) -> list[dict[str, str]]:
    try:
        with (folder / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def curve(folder: Path) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in ("step", "loss", "val_loss")) for row in rows(folder)]


def wait_for_steps(job: launcher.Job, folder: Path, least: int) -> None:
    job.wait_until(lambda: len(rows(folder)) >= least)


def leave(job: launcher.Job, *also: signal.Signals) -> launcher.Outcome:
    """Told to one rank only: all of them agree."""
    lines = {pid: line.split() for pid, line in job.processes().items()}
    ranks = [pid for pid, line in lines.items() if line[1:3] == ["-m", "hpcsync.train"]]
    # All signals at once.
    for number in (signal.SIGSTOP, signal.SIGUSR2, *also, signal.SIGCONT):
        os.kill(max(ranks), number)
    outcome = job.wait(120)
    outcome.assert_clean()
    return outcome


def test_who_leaves_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    outcome = start(whole, "checkpoint.at_end=true").wait(120)
    assert outcome.status == 0, outcome.describe()
    job = start(broken, pace_s=0.5)
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


def test_who_is_ended_while_leaving_saves(tmp_path: Path) -> None:
    """Also where the end of a run is not to be saved."""
    made = tmp_path / "made"
    job = start(made, pace_s=0.5)
    wait_for_steps(job, made, 3)
    outcome = leave(job, signal.SIGTERM)
    assert outcome.status == 143, outcome.describe()
    done = len(rows(made))
    assert (made / "checkpoints" / "latest").read_text() == f"step-{done:08d}\n"


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR2."""
    caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR2 - 1) & 1)


def test_a_script_of_ones_own_leaves_as_documented(tmp_path: Path) -> None:
    text = (launcher.ROOT / "docs/own.md").read_text()
    (found,) = re.findall(r"```python\n(# my_long_script.py\n.*?)```", text, re.DOTALL)
    script = tmp_path / "my_long_script.py"
    script.write_text(found.replace("range(first, 50)", "range(first, 10**9)"))
    command = [*launcher.mpirun(2), sys.executable, script.name]
    job = launcher.Job(command, cwd=tmp_path)

    def ranks() -> list[int]:
        lines = {pid: line.split() for pid, line in job.processes().items()}
        return [pid for pid, line in lines.items() if line[1:] == [script.name]]

    job.wait_until(lambda: len(found := ranks()) == 2 and listens(max(found)))
    os.kill(max(ranks()), signal.SIGUSR2)
    outcome = job.wait(120)
    assert outcome.status == 75, outcome.describe()
    state = torch.load(tmp_path / "state.pt")
    assert state["step"] >= 1
    script.write_text(found.replace("range(first, 50)", "range(first, first + 2)"))
    outcome = launcher.Job(command, cwd=tmp_path).wait(120)
    assert outcome.status == 0, outcome.describe()


def test_who_could_not_save_says_so(tmp_path: Path) -> None:
    made = tmp_path / "made"
    job = start(made, pace_s=0.5)
    wait_for_steps(job, made, 3)
    (made / "checkpoints").write_text("in the way")
    outcome = leave(job)
    assert outcome.status == 3, outcome.describe()
    assert "the last checkpoint was not saved" in outcome.stderr
