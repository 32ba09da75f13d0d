"""Jobs that stand still: every rank leaves a dump, one report says who is missing, the job ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcsync.trace import hang
from hpcsync.trace.analysis import stuck
from tests import launcher

pytestmark = pytest.mark.usefixtures("mpi")

MODEL = '''
import os, signal, threading, time
import torch
from torch import nn
from hpcsync.models import mlp

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))


class Stuck(nn.Module):
    """One rank stands still in the third step."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, inputs, targets):
        self.calls += 1
        if self.calls == 3 and RANK == {rank}:
            if {quit}:
                timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGQUIT))
                timer.start()
            waits_here_for_ever()
        return self.inner(inputs, targets)


def waits_here_for_ever():
    time.sleep(600)


def build(config, source):
    return Stuck(mlp.build(config, source))
'''
SMALL = (
    *("model.layers=2", "model.hidden=16", "data.name=digits", "train.steps=6"),
    *("train.global_batch=6", "train.eval_every=0", "comm.bucket_mb=0.002"),
)


def job(folder: Path, ranks: int, rank: int, *words: str, quits: bool = False) -> launcher.Outcome:
    text = MODEL.replace("{rank}", str(rank)).replace("{quit}", str(quits))
    (folder / "stuck_model.py").write_text(text)
    return launcher.run(
        ranks,
        *("-m", "hpcsync.train", "model.name=stuck_model:build", *SMALL, *words),
        *("--out", str(folder / "run")),
        cwd=folder,
        timeout=120,
    )


@pytest.mark.parametrize("ranks_per_node", [0, 1])
def test_a_missing_rank_is_named(tmp_path: Path, ranks_per_node: int) -> None:
    outcome = job(tmp_path, 3, 1, "comm.timeout_s=4", f"topology.ranks_per_node={ranks_per_node}")
    outcome.assert_clean()
    assert outcome.status == 1, outcome.describe()
    dumps, problems = hang.load(tmp_path / "run")
    assert problems == []
    assert [dump.rank for dump in dumps] == [0, 1, 2]
    found = stuck.report(dumps, 3)
    assert found.missing == (1,)
    assert outcome.stderr.count("waits_here_for_ever") == 1, outcome.describe()
    for line in stuck.render(found):
        assert line.strip() in outcome.stderr
    assert outcome.stderr.count("hpcsync: error:") == 1
    assert dumps[1].step == 3
    # Who gave up tells where it waited, not where it told.
    (gave_up, *_) = (dump for dump in dumps if dump.reason == "timeout")
    frames = gave_up.stacks[0].frames
    assert not frames[-1].file.endswith("hangs.py")
    assert "backward" in [frame.function for frame in frames]
    assert dumps[0].events.shape[0] > 10


def test_sigquit_makes_all_ranks_tell(tmp_path: Path) -> None:
    outcome = job(tmp_path, 2, 1, quits=True)
    outcome.assert_clean()
    assert outcome.status != 0
    dumps, _ = hang.load(tmp_path / "run")
    assert [dump.rank for dump in dumps] == [0, 1]
    assert "waits_here_for_ever" in outcome.stderr, outcome.describe()
    assert [dump.reason for dump in dumps] == ["request", "SIGQUIT"]


def test_a_rank_alone_tells_too(tmp_path: Path) -> None:
    outcome = job(tmp_path, 1, 0, quits=True)
    outcome.assert_clean()
    assert outcome.status == 131, outcome.describe()
    assert "waits_here_for_ever" in outcome.stderr
