"""Runs that save and go on: to the same bits, in the same folder, with another deck."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from hpcsync import checkpoint
from hpcsync.checkpoint.writer import PartWriter
from hpcsync.engine import Engine
from hpcsync.errors import CheckpointError
from tests.tiny_runs import SIZE, numbers, run, same_bits, step

pytestmark = pytest.mark.mpi
CODED = (
    *("bf16", "fp8", "int8", "int8_shared", "int4", "onebit", "topk", "threshold", "randomk"),
    "powersgd",
)


@pytest.mark.parametrize("codec", CODED)
def test_a_resumed_run_makes_the_same_bits(folder: Path, comm: MPI.Intracomm, codec: str) -> None:
    words = [
        f"compress.codec={codec}",
        "compress.warmup=2",
        "compress.min_elements=64",
        "compress.rounding=stochastic",
        "compress.rank=2",
        f"topology.ranks_per_node={max(1, SIZE // 2)}",
        f"checkpoint.files={'node' if codec in ('int8', 'powersgd') else 'rank'}",
    ]
    words += ["compress.momentum=0.5", "compress.ratio=0.1"] if codec == "topk" else []
    words += ["train.optimizer=onebit_adam", "train.freeze=3"] if codec == "onebit" else []
    words += ["train.loss_scale=dynamic"] if codec == "int4" else []
    whole, rest = folder / "whole", folder / "rest"
    assert run(*words, "--out", str(whole)) == 0
    assert run(*words, "--out", str(rest), "--resume", step(whole, 4)) == 0
    if comm.rank == 0:
        assert numbers(rest) == numbers(whole)[4:]
        same_bits(whole, rest, 8)
        held = [name for name in os.listdir(step(whole, 8)) if name.endswith(".h5")]
        writers = min(2, SIZE) if "checkpoint.files=node" in words else SIZE
        assert len(held) == writers + 1


def test_a_run_goes_on_in_its_folder(
    folder: Path, comm: MPI.Intracomm, capfd: pytest.CaptureFixture[str]
) -> None:
    """What came after the checkpoint is done again, and its rows are there once."""
    made, whole = folder / "made", folder / "whole"
    auto = ("--out", str(made), "--resume", "auto")
    assert run("train.steps=8", "--out", str(whole)) == 0
    assert run("checkpoint.every=3", "checkpoint.at_end=false", *auto) == 0
    assert comm.rank or "starts anew" in capfd.readouterr().err
    if comm.rank == 0:
        names = sorted(os.listdir(made / "checkpoints"))
        assert names == ["latest", "step-00000003", "step-00000006"]
        (made / "checkpoints" / ".step-00000007.tmp").mkdir()
        with (made / "metrics.csv").open("a") as file:
            file.write("9,1.2")  # torn off by a kill
    comm.Barrier()
    assert run("train.eval_every=2", *auto) == 0
    if comm.rank == 0:
        told = capfd.readouterr().err
        assert "train.eval_every = 2 (was 4)" in told
        assert f"goes on after step 6, from {step(made, 6)}" in told
        assert [row[:4] for row in numbers(made)] == [row[:4] for row in numbers(whole)]
        same_bits(whole, made, 8)
        assert not (made / "checkpoints" / ".step-00000007.tmp").exists()
        assert (made / "config-1.toml").exists()
        summary = json.loads((made / "summary.json").read_text())
        first = json.loads((whole / "summary.json").read_text())
        assert (summary["first_step"], summary["steps"], summary["status"]) == (6, 8, "done")
        for name in ("loss_first", "val_loss_first", "loss_last", "val_loss"):
            assert summary[name] == first[name]
        events = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
        assert [e["first_step"] for e in events if e["event"] == "started"] == [0, 6]


def test_nothing_is_left_to_do(folder: Path, comm: MPI.Intracomm) -> None:
    made = folder / "made"
    assert run("--out", str(made)) == 0
    before = numbers(made) if comm.rank == 0 else []
    assert run("--resume", str(made)) == 0
    if comm.rank == 0:
        assert numbers(made) == before
        assert sorted(os.listdir(made / "checkpoints")) == [
            "latest",
            "step-00000004",
            "step-00000008",
        ]


def test_changed_decks(folder: Path, comm: MPI.Intracomm) -> None:
    made = folder / "made"
    assert run("--out", str(made)) == 0
    with pytest.raises(CheckpointError, match=r"train\.lr = 0\.5 .*--allow-change train\.st.*\.lr"):
        run("--resume", str(made), "train.lr=0.5", "train.beta1=0.5", "train.steps=9")
    with pytest.raises(CheckpointError, match=r"train\.steps = 9 \(was 8\); set"):
        run("--resume", str(made), "train.steps=9")
    with pytest.raises(CheckpointError, match=r"model\.width = 64"):
        run("--resume", str(made), "model.width=64")
    words = ("model.width=64", "--allow-change", "model.width")
    with pytest.raises(CheckpointError, match=r"embedding\.weight has shape"):
        run("--resume", str(made), *words)
    words = ("train.lr=0.5", "train.beta1=0.5", "train.global_batch=16", "train.steps=9")
    names = "train.lr,train.beta1,train.global_batch,train.steps"
    assert run("--resume", str(made), *words, "--allow-change", names) == 0
    if comm.rank == 0:
        assert len(numbers(made)) == 9
        with checkpoint.open(step(made, 9)) as found:
            assert found.manifest.tokens == (8 * 8 + 16) * 16


def test_a_stopped_run_tells_that_its_last_checkpoint_failed(
    folder: Path,
    comm: MPI.Intracomm,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = folder / "made"

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = Engine.step

    def step(self: Engine, batches: Any) -> Any:
        if self.step_count == 2 and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, batches)

    monkeypatch.setattr(PartWriter, "write", fails)
    monkeypatch.setattr(Engine, "step", step)
    assert run("--out", str(made), "train.eval_every=0") == 128 + signal.SIGTERM
    if comm.rank == 0:
        text = "stopped by SIGTERM; the last checkpoint was not saved"
        assert capfd.readouterr().err.splitlines()[-1] == f"hpcsync: {text}"
        summary = json.loads((made / "summary.json").read_text())
        assert (summary["status"], summary["detail"]) == ("interrupted", text)
