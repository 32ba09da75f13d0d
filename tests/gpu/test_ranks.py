"""Several processes on a GPU: memory and events between them, transports, gradients, training.

They share one GPU where there is only one.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import launcher

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("mpi"), pytest.mark.timeout(900)]

SMALL = ("model.layers=4", "model.width=256", "model.heads=4", "model.context=128")


def run(ranks: int, name: str, *words: str) -> launcher.Outcome:
    outcome = launcher.run(ranks, "-m", "tests.gpu.ranks", name, *words, timeout=600, gpus=True)
    assert outcome.status == 0, outcome.describe()
    outcome.assert_clean()
    return outcome


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_and_events_between_processes(ranks: int) -> None:
    run(ranks, "share")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("transport", ["cuda_ipc", "mpi_staged"])
def test_sums_in_a_node(ranks: int, transport: str) -> None:
    run(ranks, "sums", transport, f"comm.transport.node={transport}")


def test_sums_across_nodes() -> None:
    keys = ["topology.ranks_per_node=2", "comm.transport.rail=mpi_staged"]
    run(4, "sums", "mpi_staged", *keys, "comm.algorithm=hierarchical")


@pytest.mark.parametrize("transport", ["cuda_ipc", "mpi_staged"])
def test_gradients_are_those_of_one_rank(transport: str) -> None:
    run(2, "gradients", f"comm.transport.node={transport}")


def test_a_step_asks_for_no_synchronisation() -> None:
    run(2, "quiet", "comm.transport.node=cuda_ipc")


def train(folder: Path, ranks: int, *words: str) -> list[float]:
    """The losses of a short run."""
    given = [*SMALL, "train.steps=12", "train.global_batch=8", "topology.share_devices=true"]
    arguments = ["-m", "hpcsync.train", "model.name=gpt", *given, *words, "--out", str(folder)]
    outcome = launcher.run(ranks, *arguments, timeout=600, gpus=True)
    assert outcome.status == 0, outcome.describe()
    outcome.assert_clean()
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_equals_the_cpus(tmp_path: Path, ranks: int) -> None:
    host = train(tmp_path / "cpu", 1, "train.device=cpu")
    gpu = train(tmp_path / "cuda", ranks, "train.device=cuda")
    assert len(host) == len(gpu) == 12
    for step, (wanted, made) in enumerate(zip(host, gpu, strict=True)):
        assert made == pytest.approx(wanted, rel=1e-4 * (1 + step)), step


def test_training_in_bf16_is_near_the_cpus(tmp_path: Path) -> None:
    host = train(tmp_path / "cpu", 1, "train.device=cpu")
    gpu = train(tmp_path / "cuda", 2, "train.device=cuda", "train.precision=bf16")
    for wanted, made in zip(host, gpu, strict=True):
        assert made == pytest.approx(wanted, rel=0.02)


def test_staged_training_gives_the_bits_of_ipc(tmp_path: Path) -> None:
    """Both add in rank order, in FP32."""
    losses = [
        train(tmp_path / name, 2, "train.device=cuda", f"comm.transport.node={name}")
        for name in ("cuda_ipc", "mpi_staged")
    ]
    assert losses[0] == losses[1]


def test_overlap_is_seen_in_a_trace(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, 2, "train.device=cuda", "trace.enabled=true", "trace.every=1", "comm.bucket_mb=1")
    tool = launcher.ROOT / "tools" / "trace.py"
    outcome = launcher.Job([sys.executable, str(tool), "summary", str(folder), "--json"]).wait(120)
    assert outcome.status == 0, outcome.describe()
    found: dict[str, Any] = json.loads(outcome.stdout)
    assert _named(found, "overlap") > 0, outcome.stdout


def _named(found: Any, name: str) -> float:
    """The first number of that name, however deep."""
    if isinstance(found, dict):
        if isinstance(found.get(name), int | float):
            return float(found[name])
        found = list(found.values())
    if isinstance(found, list):
        return max((_named(each, name) for each in found), default=0.0)
    return 0.0
