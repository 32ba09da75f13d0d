"""Small runs on the ranks of an MPI job, and what they leave in their folders."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from mpi4py import MPI

from hpcsync import checkpoint, train

SIZE = MPI.COMM_WORLD.size
TINY = (
    "train.steps=8",
    "train.warmup=2",
    "train.global_batch=8",
    "train.eval_batches=1",
    "train.eval_every=4",
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "model.context=16",
    "model.dropout=0.1",
    "data.options={max_mb=0.5}",
    "checkpoint.every=4",
    "trace.enabled=false",
)
# What differs between two runs of the same bits.
OF_THE_RUN = {"run"}


def replaced(keys: Sequence[str], words: Sequence[str]) -> list[str]:
    """``words`` and those of ``keys`` that they do not replace."""
    given = {word.partition("=")[0] for word in words}
    return [*(key for key in keys if key.partition("=")[0] not in given), *words]


def run(*words: str) -> int:
    """The status of a tiny run, when all ranks are done with it."""
    status = train.run(replaced(TINY, words))
    MPI.COMM_WORLD.Barrier()
    return status


def step(run: Path, number: int) -> str:
    """The folder of a step's checkpoint."""
    return str(run / "checkpoints" / f"step-{number:08d}")


def numbers(run: Path) -> list[tuple[str, ...]]:
    """What two runs of the same bits have the same of each step."""
    return columns(run, ("step", "loss", "lr", "grad_norm", "loss_scale", "codec", "val_loss"))


def columns(run: Path, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Columns of a run's metrics.csv, row by row."""
    return [tuple(row[name] for name in names) for row in rows(run)]


def rows(run: Path) -> list[dict[str, str]]:
    """A run's metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_bits(one: Path, other: Path, number: int) -> None:
    """All that two runs would go on from is the same: tensors, plain values, generators."""
    with checkpoint.open(step(one, number)) as a, checkpoint.open(step(other, number)) as b:
        assert list(a.manifest.tensors) == list(b.manifest.tensors)
        for name in a.manifest.tensors:
            assert torch.equal(a.tensor(name), b.tensor(name)), name
        assert a.manifest.own == b.manifest.own
        common = a.manifest.common, b.manifest.common
        assert {k for k in common[0] if common[0][k] != common[1][k]} <= OF_THE_RUN
