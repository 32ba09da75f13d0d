"""Runs whose steps are read one step late, as on a GPU, against runs that wait for each."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from hpcsync import assembly, checkpoint, train
from hpcsync.engine import Engine
from tests.tiny_runs import columns

pytestmark = pytest.mark.mpi

TINY = (
    "train.steps=7",
    "train.warmup=2",
    "train.global_batch=8",
    "train.eval_batches=2",
    "train.eval_every=3",
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.context=16",
    "model.dropout=0.1",
    "data.options={max_mb=0.5}",
    "checkpoint.every=2",
)
COLUMNS = ("step", "loss", "lr", "grad_norm", "loss_scale", "val_loss")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "Engine", functools.partial(Engine, lag=1))


def weights(run: Path, step: int) -> dict[str, Any]:
    with checkpoint.open(run / "checkpoints" / f"step-{step:08d}") as found:
        model: dict[str, Any] = found.common()["model"]
        return model


def compare(one: Path, two: Path, steps: tuple[int, ...]) -> None:
    assert columns(one, COLUMNS) == columns(two, COLUMNS)
    for step in steps:
        first, second = weights(one, step), weights(two, step)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), step
    told = [json.loads((each / "summary.json").read_text()) for each in (one, two)]
    names = ("steps", "loss_first", "loss_last", "val_loss", "status", "codec")
    assert [told[0][name] for name in names] == [told[1][name] for name in names]


def test_a_run_makes_the_same_bits(
    folder: Path, comm: MPI.Intracomm, request: pytest.FixtureRequest
) -> None:
    assert train.run([*TINY, "--out", str(folder / "plain")]) == 0
    request.getfixturevalue("late")
    assert train.run([*TINY, "--out", str(folder / "late")]) == 0
    if comm.rank == 0:
        compare(folder / "plain", folder / "late", (4, 6, 7))


@pytest.mark.usefixtures("late")
def test_a_late_run_that_is_stopped_and_resumed(folder: Path, comm: MPI.Intracomm) -> None:
    words = ["train.min_lr=1", *(word for word in TINY if "eval_every" not in word)]
    words.append("train.eval_every=2")
    assert train.run([*words, "--out", str(folder / "whole")]) == 0
    parts = [*words, "--out", str(folder / "parts")]
    fewer = [word for word in parts if "train.steps" not in word]
    assert train.run([*fewer, "train.steps=4"]) == 0
    assert train.run([*parts, "--resume", "auto"]) == 0
    if comm.rank == 0:
        compare(folder / "whole", folder / "parts", (6, 7))
