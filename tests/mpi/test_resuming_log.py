"""Runs that go on from a checkpoint and the replay log after it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from hpcsync.checkpoint.writer import Part, PartWriter
from hpcsync.engine import Engine
from hpcsync.errors import UserError
from hpcsync.loop import Loop
from tests.tiny_runs import SIZE, columns, numbers, run, step

pytestmark = pytest.mark.mpi


def test_no_step_is_made_before_a_log_has_its_base(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the first steps would cost all of them while the first checkpoint is written."""
    write, engine_step = PartWriter.write, Engine.step
    there: list[bool] = []

    def slowly(*arguments: Any) -> Part:
        time.sleep(0.3)
        return write(*arguments)

    def step_(engine: Engine, batches: Any) -> Any:
        there.append((folder / "made" / "checkpoints" / "latest").exists())
        return engine_step(engine, batches)

    monkeypatch.setattr(PartWriter, "write", slowly)
    monkeypatch.setattr(Engine, "step", step_)
    words = ("checkpoint.replay_log=true", "train.steps=3", "--out", str(folder / "made"))
    assert run(*words) == 0
    assert there == [True] * 3


def test_a_log_is_not_replayed_on_another_base(
    folder: Path, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that does not log has replaced a checkpoint that a log follows on."""
    made, replay = folder / "made", folder / "made" / "checkpoints" / "replay"
    words = ("checkpoint.every=3", "checkpoint.at_end=false", "--out", str(made))
    assert run(*words, "checkpoint.replay_log=true") == 0
    if comm.rank == 0:
        shutil.rmtree(step(made, 6))
        shutil.copytree(replay, folder / "kept")
    comm.Barrier()
    changed = ("train.lr=0.01", "--allow-change", "train.lr", "--resume", "auto")
    assert run(*words, *changed, "checkpoint.replay_log=false") == 0
    expected = numbers(made) if comm.rank == 0 else []
    assert not replay.exists()
    comm.Barrier()
    if comm.rank == 0:
        (folder / "kept").rename(replay)
        capfd.readouterr()
    comm.Barrier()
    assert run(*words, *changed, "checkpoint.replay_log=true") == 0
    if comm.rank == 0:
        assert "it is of another run" in capfd.readouterr().err
        assert numbers(made) == expected


@pytest.mark.parametrize("last", [4, 8])
def test_a_replay_that_ends_before_the_held_out_loss(
    folder: Path, comm: MPI.Intracomm, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lost run died between a step and its held-out loss."""
    made, whole = folder / "made", folder / "whole"
    words = ("checkpoint.every=0", "checkpoint.at_end=false", "checkpoint.replay_log=true")
    assert run(*words, "--out", str(whole)) == 0

    def dies(self: Loop) -> float:
        if self.parts.engine.step_count == last:
            raise UserError("planted")
        return before(self)

    before = Loop.held_out
    monkeypatch.setattr(Loop, "held_out", dies)
    with pytest.raises(UserError, match="planted"):
        run(*words, "--out", str(made))
    monkeypatch.undo()
    comm.Barrier()
    assert run(*words, "--out", str(made), "--resume", "auto") == 0
    if comm.rank == 0:
        names = ("step", "loss", "lr", "grad_norm", "loss_scale", "val_loss")
        assert columns(made, names) == columns(whole, names)
        found, wanted = (json.loads((each / "summary.json").read_text()) for each in (made, whole))
        assert (found["checkpoint_step"], found["first_step"]) == (0, last)
        for name in ("loss_first", "loss_last", "val_loss", "skipped", "steps", "status"):
            assert found[name] == wanted[name]


def test_a_loss_that_is_nan_ends_a_replay_as_it_ended_the_run(
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made, before = folder / "made", Engine.step
    words = ("checkpoint.every=0", "checkpoint.at_end=false", "--out", str(made))

    def step(self: Engine, batches: Any) -> Any:
        result = before(self, batches)
        bad = result.step == 3 and comm.rank == comm.size - 1
        return dataclasses.replace(result, loss=math.nan) if bad else result

    monkeypatch.setattr(Engine, "step", step)
    assert run(*words, "checkpoint.replay_log=true") == 1
    monkeypatch.undo()
    capfd.readouterr()
    assert run(*words, "checkpoint.replay_log=true", "--resume", "auto") == 1
    if comm.rank == 0:
        assert f"step 3: the loss is nan on rank {SIZE - 1}" in capfd.readouterr().err
        summary = json.loads((made / "summary.json").read_text())
        assert summary["status"] == "failed"
        assert "checkpoint.replay_log=false" in summary["detail"]
    comm.Barrier()
    assert run(*words, "checkpoint.replay_log=false", "--resume", "auto") == 0
