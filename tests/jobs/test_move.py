"""Weights on their way: from a file into a run of two ranks, and out of a run into files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsync import data
from tests import launcher, trained

pytestmark = [pytest.mark.usefixtures("mpi"), pytest.mark.timeout(300)]

DECK = (
    *("model.name=convnet", "data.name=digits", "model.layers=2", "model.width=24"),
    *("model.heads=2", "model.context=16", "train.global_batch=8", "train.eval_batches=1"),
)


def train(folder: Path, *words: str) -> launcher.Outcome:
    return launcher.run(
        *(2, "-m", "hpcsync.train", *DECK, *words, "--out", str(folder / "run")),
        cwd=folder,
        timeout=240,
    )


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return found


def test_a_run_begins_with_given_weights(tmp_path: Path) -> None:
    """The first held-out loss is that of the weights, on two ranks, and nothing is learnt."""
    _, source, model = trained.small("convnet", "run.seed=7")
    with torch.no_grad():
        model.head.weight.mul_(3)
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, tmp_path / "w.pt")
    outcome = train(tmp_path, "model.init_from=w.pt", "train.steps=1", "train.lr=0")
    assert outcome.status == 0, outcome.describe()
    outcome.assert_clean()
    assert "weights" in outcome.stdout

    wanted = data.spread(source.val_size, 8)
    model.eval()
    with torch.no_grad():
        loss = float(model(*source.val_batch(wanted)))
    assert summary(tmp_path)["val_loss_first"] == pytest.approx(loss, rel=1e-5)


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    outcome = train(tmp_path, "model.init_from=w.pt")
    outcome.assert_clean()
    assert outcome.status == 2, outcome.describe()
    (line,) = [each for each in outcome.stderr.splitlines() if "hpcsync: error" in each]
    assert "model.init_from: w.pt does not fit the model" in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_exported_and_begun_with(tmp_path: Path) -> None:
    """What a run saves at its end is what an export holds, and what another run begins with."""
    outcome = train(tmp_path, "train.steps=6", "train.warmup=1")
    assert outcome.status == 0, outcome.describe()
    for name in ("w.safetensors", "w.pt", "model.onnx"):
        words = ("-m", "hpcsync.export", "run", "--to", name)
        done = launcher.run(0, *words, cwd=tmp_path, timeout=120)
        assert done.status == 0, done.describe()
        assert f"{name}: " in done.stdout
        assert "of step 6" in done.stdout
        assert not done.stderr
    loss = summary(tmp_path)["val_loss"]
    (tmp_path / "run").rename(tmp_path / "before")
    for source in ("before", "w.pt", "w.safetensors"):
        outcome = train(tmp_path, f"model.init_from={source}", "train.steps=1", "train.lr=0")
        assert outcome.status == 0, outcome.describe()
        assert summary(tmp_path)["val_loss_first"] == pytest.approx(loss, rel=1e-6)
        (tmp_path / "run").rename(tmp_path / f"from-{source}")
    tool = str(launcher.ROOT / "tools" / "checkpoint.py")
    done = launcher.run(0, tool, "diff", "from-w.pt", "from-w.safetensors", cwd=tmp_path)
    assert "0 of" in done.stdout, done.describe()
    done = launcher.run(0, tool, "verify", "before", cwd=tmp_path)
    assert done.status == 0, done.describe()
